"""The Hugging Face Hub: its client is called through `fetch`, which fails soon, in one sentence."""

import functools
import inspect
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, errors, get_token

from nanoqstar import InputError
from nanoqstar.files import shown

PATIENCE = 2.0  # seconds that one address of the Hub may be silent; all of them together twice that


def hub_id(name: str | os.PathLike) -> str:
    """`name` as text, where it may be an `owner/name`; InputError where it can only be a path."""
    name = str(name)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; give the folder it lies in")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"there is no folder '{shown(name)}', and it is no Hub id either "
                         "(owner/name)")
    return name


@functools.cache
def answers(endpoint: str) -> bool:
    """Whether anybody listens at this URL, within 4 s: the client would ask for half a minute, or
    for ever where packets vanish."""
    url, found = urlsplit(endpoint), []
    host, port = str(url.hostname), url.port or {"http": 80}.get(url.scheme, 443)
    proxies = urllib.request.getproxies()
    if proxies.keys() & {url.scheme, "all"} and not urllib.request.proxy_bypass(host):
        return True  # only the proxy knows

    def knock():
        try:
            socket.create_connection((host, port), PATIENCE).close()
            found.append(host)
        except OSError:
            pass
    thread = threading.Thread(target=knock, daemon=True)  # a name server takes the time it wants
    thread.start()
    thread.join(2 * PATIENCE)
    return bool(found)


def fetch(call: Callable, name: str, *args: Any, **options: Any) -> Any:
    """call(name, ...) of the Hub's client; what it fetched earlier where the Hub does not answer.

    Raises InputError: no network, no repository `name`, no access to it, no such file in it.
    """
    try:
        if not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
            if "local_files_only" not in inspect.signature(call).parameters:
                raise errors.OfflineModeIsEnabled  # nothing that could have been kept
            options["local_files_only"] = True
        return call(name, *args, **options)
    except Exception as error:  # the client and its HTTP library have dozens of classes
        raise InputError(explain(name, error, *args)) from error


def explain(name: str, error: BaseException, *args: Any) -> str:
    """What is wrong with the repository `name`, of which `args` were asked, and how to mend it."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # why the Hub could not be asked
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return (f"the Hub refuses access to {name!r} ({status}): the name is wrong, or it is "
                "private or gated: accept its terms on its page, then set HF_TOKEN or run "
                "`hf auth login`")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the Hub's {name!r} has no {' or '.join(map(str, args)) or 'such file'}"
    if status == 404:
        return f"{name!r} is neither on this disk nor on the Hub (404)"
    if status:
        reason = f"the Hub answered {status}"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled,
                            errors.HTTPError)):  # the last is the HTTP library's
        reason = "no network, or HF_HUB_OFFLINE is set: go online, or give a local folder"
    else:  # such as a full disk
        reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name!r} is not on this disk, and cannot be fetched from the Hub: {reason}"


def status_of(error: BaseException) -> int | None:
    """What the Hub answered, if it did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def check_push(name: str) -> None:
    """InputError where `name` is no OWNER/NAME, or nobody is logged in to write there."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"--push: '{shown(name)}' is no OWNER/NAME of a model on the Hub")
    if get_token() is None:
        raise InputError(f"nothing can be pushed to {name!r} without a token: set HF_TOKEN, or run "
                         "`hf auth login`, with one that may write")


def push(folder: Path, name: str, message: str) -> None:
    """Uploads a folder as a commit to the Hub's model `name`, made private where there is none.

    What else lies there stays. Raises InputError: no token, no network, no right to write.
    """
    check_push(name)
    try:  # not what `answers` remembers: a run may push for weeks
        if constants.HF_HUB_OFFLINE or not answers.__wrapped__(constants.ENDPOINT):
            raise errors.OfflineModeIsEnabled
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:  # as in `fetch`
        status, reason = status_of(error), " ".join(str(error).split()) or type(error).__name__
        if status in (401, 403):
            reason = f"the Hub refuses it ({status}): use a token that may write there"
        elif status:
            reason = f"the Hub answered {status}"
        elif isinstance(error, (errors.OfflineModeIsEnabled, errors.HTTPError)):
            reason = "no network, or HF_HUB_OFFLINE is set"
        raise InputError(f"{shown(name)!r} on the Hub was not written: {reason}") from error
