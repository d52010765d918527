"""mmsegmentation's keys that are no alias of a setting: those of the backbone's size, and those without effect."""

MODEL_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
MODEL_KEYS = {f"model.backbone.{name}": f"model_kwargs.{name}" for name in MODEL_SIZES}

_PRECISION = "amp_dtype sets the number format"
_CLASSES = "the number of classes follows from the class list (classes)"
_WIDTH = "the heads are as wide as the model's blocks"
_SCHEDULE = "the schedule is poly with a linear warm-up, by iterations"
_NORM = "batch norm is synchronised where there are several processes"
KEYS_WITHOUT_EFFECT = {
    "fp16": _PRECISION,
    "optimizer_config.use_fp16": _PRECISION,
    "optimizer_config.type": _PRECISION,
    "optimizer_config.coalesce": "gradients are averaged by DistributedDataParallel",
    "optimizer_config.bucket_size_mb": "gradients are averaged by DistributedDataParallel",
    "find_unused_parameters": "every parameter is used",
    "model.decode_head.num_classes": _CLASSES,
    "model.auxiliary_head.num_classes": _CLASSES,
    "model.decode_head.in_channels": _WIDTH,
    "model.auxiliary_head.in_channels": _WIDTH,
    "model.decode_head.norm_cfg.type": _NORM,
    "model.auxiliary_head.norm_cfg.type": _NORM,
    "model.backbone.with_cp": "model.backbone.use_checkpoint saves memory",
    "optimizer.constructor": "learning rates decay from layer to layer (layer_decay)",
    "optimizer.paramwise_cfg.num_layers": "the number of blocks follows from the model",
    "lr_config.policy": _SCHEDULE,
    "lr_config.warmup": _SCHEDULE,
    "lr_config.by_epoch": _SCHEDULE,
    "runner.type": "a run counts iterations",
    "checkpoint_config.by_epoch": "a run counts iterations",
    "evaluation.by_epoch": "a run counts iterations",
    "evaluation.metric": "mIoU, mAcc and aAcc are always measured",
    "cudnn_benchmark": "--deterministic settles it",
    "dist_params.backend": "NCCL between GPUs, gloo between CPUs",
    "log_level": "the log has one level",
}
