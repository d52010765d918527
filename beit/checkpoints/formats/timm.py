"""timm's ``Beit``: the official names unchanged, without the index buffers, and a ``config.json`` that rebuilds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from beit.checkpoints.formats import unilm

to_official = unilm.to_official


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights as timm keeps them: the same names, and no buffers."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith(unilm.INDEX)}


def config_json(
    arguments: Mapping[str, Any], preprocessing: Mapping[str, Any], labels: Sequence[str] | None
) -> dict[str, Any]:
    """Describes a model so that ``timm.create_model("local-dir:FOLDER")`` builds it.

    Args:
        arguments: Keywords of our constructor; ``num_classes`` is absent for a pre-training model.
        preprocessing: ``mean``, ``std``, ``crop_pct`` and ``interpolation`` of the images.
        labels: Names of the classes, if they are known.
    """
    same = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values")
    positions = ("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    classes = arguments.get("num_classes", 0)
    pool = "avg" if arguments.get("use_mean_pooling", False) else "token"
    size = list(arguments["img_size"])
    model_args = {name: arguments[name] for name in (*same, *positions)} | {"img_size": size, "global_pool": pool}
    large = arguments["embed_dim"] == 1024
    config = {
        "architecture": "beit_large_patch16_224" if large else "beit_base_patch16_224",
        "num_classes": classes,
        "num_features": arguments["embed_dim"],
        "global_pool": pool,
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], *size],
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **preprocessing,
        },
    }
    return config | ({"label_names": list(labels)} if labels else {})


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a ``config.json`` of timm says about the images, the heads and the classes."""
    recorded = dict(config.get("pretrained_cfg", {}))
    found = {key: recorded[key] for key in ("mean", "std", "crop_pct", "interpolation") if recorded.get(key)}
    if len(recorded.get("input_size") or ()) == 3:
        found["image_size"] = tuple(recorded["input_size"][1:])
    arguments = config.get("model_args") or {}
    if "num_heads" in arguments:
        found["num_heads"] = arguments["num_heads"]
    labels = config.get("label_names") or recorded.get("label_names")
    return found | ({"labels": tuple(labels)} if labels else {})
