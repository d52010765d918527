"""mmsegmentation's keys: those that mean a setting, and those without effect. Keys of iterations are with theirs."""

MODEL_SIZES = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
_DATA = {"data_root": "data_path", "reduce_zero_label": "reduce_zero_label"}
_VALIDATION = {**_DATA, "img_dir": "val_images", "ann_dir": "val_annotations"}
_SETTINGS: dict[str, dict[str, str]] = {
    "data": {"samples_per_gpu": "batch_size", "workers_per_gpu": "num_workers"},
    "data.train": {**_DATA, "img_dir": "train_images", "ann_dir": "train_annotations"},
    "data.val": _VALIDATION,
    "data.test": _VALIDATION,
    "model": {"pretrained": "init_from"},
    "model.backbone": {
        **{name: f"model_kwargs.{name}" for name in MODEL_SIZES},
        **{"img_size": "crop_size", "out_indices": "out_indices", "drop_path_rate": "drop_path"},
        **{"init_values": "layer_scale_init_value", "use_checkpoint": "grad_checkpointing"},
        **{"use_rel_pos_bias": "rel_pos_bias", "use_abs_pos_emb": "abs_pos_emb"},
    },
    "model.decode_head": {"channels": "head_channels", "dropout_ratio": "head_dropout"},
    "model.auxiliary_head": {"channels": "auxiliary_channels", "in_index": "auxiliary_index"},
    "model.auxiliary_head.loss_decode": {"loss_weight": "auxiliary_weight"},
    "model.test_cfg": {"mode": "test_mode", "crop_size": "crop_size", "stride": "slide_stride"},
    "optimizer": {
        **{"type": "opt", "eps": "opt_eps", "betas": "opt_betas"},
        **{name: name for name in ("lr", "momentum", "weight_decay")},
    },
    "optimizer.paramwise_cfg": {"layer_decay_rate": "layer_decay"},
    "optimizer_config": {"update_interval": "update_freq", "grad_clip": "clip_grad", "grad_clip.max_norm": "clip_grad"},
    "lr_config": {"warmup_ratio": "warmup_ratio", "power": "power", "min_lr": "min_lr"},
    "checkpoint_config": {"max_keep_ckpts": "keep_checkpoints"},
    "log_config": {"interval": "log_every"},
}
KEYS = {f"{section}.{key}": name for section, keys in _SETTINGS.items() for key, name in keys.items()}

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
