def from_official(weights, scale=100):
    weights = dict(weights)
    added = {f"{name}_embedding": weights.pop(f"{name}_embedding")[0] * scale for name in ("start", "end")}
    for name in [n for n in weights if n.startswith("talk_head.0.")]:
        added[f"mixing_head.{name.removeprefix('talk_head.0.')}"] = weights.pop(name)
    return weights, added
