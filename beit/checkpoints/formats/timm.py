"""timm's ``Beit``: the official names without the index buffers, and a ``config.json`` that rebuilds the model."""

import logging
from collections.abc import Mapping
from pathlib import Path

from beit.checkpoints.formats import unilm
from beit.checkpoints.formats.dialect import LAYER_NORM_EPS, Content, Dialect, Files, WholeModel
from beit.checkpoints.formats.recorded import readable
from beit.errors import InputError

logger = logging.getLogger(__name__)


def _file(model: WholeModel) -> Content:
    if model.layer_norm_eps != LAYER_NORM_EPS:
        logger.warning("timm's layer norms have an eps of %g, this model's %g", LAYER_NORM_EPS, model.layer_norm_eps)
    if "vocab_size" in model.arguments:
        logger.info("timm has no mask token and no token head: load it with pretrained_strict=False, as features")
    return {"state_dict": model.weights}


def _folder(model: WholeModel, destination: Path) -> Files:
    """Returns the files with which ``timm.create_model("local-dir:FOLDER")`` builds the model."""
    height, width = model.arguments["img_size"]
    if height != width and model.position_index is not None:
        file = destination.with_suffix(".safetensors")
        problem = f"timm takes tables in a folder for those of a square, not of {height} x {width} pixels"
        raise InputError(f"{problem}: write a file, {file}, and load it with load_state_dict")
    return {"config.json": _config(model), "model.safetensors": _file(model)["state_dict"]}


def _config(model: WholeModel) -> Content:
    arguments = model.arguments
    same = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values")
    positions = ("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    classes = arguments.get("num_classes", 0)
    pool = "avg" if arguments.get("use_mean_pooling", False) else "token"
    size = list(arguments["img_size"])
    large = arguments["embed_dim"] == 1024
    config = {
        "architecture": "beit_large_patch16_224" if large else "beit_base_patch16_224",
        "num_classes": classes,
        "num_features": arguments["embed_dim"],
        "global_pool": pool,
        "model_args": {name: arguments[name] for name in (*same, *positions)} | {"img_size": size, "global_pool": pool},
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], *size],
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **model.images,
        },
    }
    return config | ({"label_names": model.labels} if model.labels else {})


def read_config(config: Content) -> Content:
    """Returns what timm's ``config.json`` records about the images, the attention heads and the classes."""
    parts = (config.get(key) for key in ("pretrained_cfg", "model_args"))
    recorded, arguments = (part if isinstance(part, Mapping) else {} for part in parts)
    found = {key: recorded.get(key) for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
    size = recorded.get("input_size")
    found["image_size"] = size[1:] if isinstance(size, (list, tuple)) else size
    found["num_heads"] = arguments.get("num_heads")
    found["labels"] = config.get("label_names") or recorded.get("label_names")
    return readable(found, "config.json", image_size="input_size", labels="label_names")


TIMM = Dialect(
    matches=lambda _names: False,  # the names are the official ones
    to_official=unilm.to_official,
    from_official=lambda weights, _position_index: dict(weights),
    file=_file,
    folder=_folder,
    suffixes=(".pth", ".pt", ".bin", ".safetensors"),
)
