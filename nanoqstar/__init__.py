"""nanoqstar: a minimal Quiet-STaR trainer (Zelikman et al. 2024, arXiv 2403.09629).

Shapes used throughout: B batch, P passes, T positions that think, K = n_ahead thought tokens of
which S = K - 2 are sampled, A = n_ahead_talk lookahead tokens, C = K + A - 1 tokens of a block,
D model width, H attention heads, G key/value heads, V vocabulary rows.
"""

__version__ = "0.1.0"


class InputError(Exception):
    """Something the user gave is wrong; the message is one sentence: what, and how to mend it.

    The scripts print it without a traceback and exit with status 2.
    """
