"""The page ``docs/reproducing.md``, from the recipes."""

from collections.abc import Iterable, Sequence

from beit.commands import memory
from beit.commands.published import TASKS, Recipe, command, plan, read_recipe, workload
from beit.config import recipe_names

GPU_COUNTS = (16, 8, 4, 2, 1)
CARDS = {"V100 16 GB": 16, "V100 32 GB": 32, "A100 80 GB": 80, "H200 141 GB": 141}

HEAD = """\
# Reproducing the published results

<!-- Written by `beit recipes document`, from beit/recipes/*.yaml: change those, then run it again. A test compares. -->

Every published row is a recipe, and a recipe is one command away. **All results on this page are quoted** from the
sources named beside them; none has been measured with this library. What is tested is that each command, read by its
launcher, means exactly the published settings, and that the batch is the published one on any number of GPUs.

```bash
beit recipes list                                                  # what there is
beit recipes show finetune_base_pt22k_224                          # settings, source, quoted results, command
beit recipes command finetune_base_pt22k_224 --gpus 2 --gpu-memory 16
```

The last line prints a command for the GPUs you have: images per GPU and `--update_freq` are worked out so that
GPUs x images x `update_freq` is the published batch, which the learning rate belongs to. A number of GPUs over which it
does not split is refused, with the nearest that do. `--nnodes 2` shares the GPUs between two machines. Replace
`/path/to/...` by your paths.

## Before you start

- **Fewer GPUs are slower, and for all but segmentation not different**: gradients of `update_freq` batches are added
  up for one step. Divide the published number of GPUs by yours to see how much longer it takes; the published times are
  for the published hardware.
- **Segmentation differs**: batch norm in its heads sees the images of one forward pass, over all GPUs: 16 as published
  (8 in `segment_large_640_pt2ft`). On fewer GPUs it is fewer, which no accumulation makes up for, and one image alone
  cannot be trained on. Keep `samples_per_gpu` as large as fits. A user who ran `segment_base_640_pt2ft` on one GPU as
  it was, 2 images at once and an update, got 48.9 mIoU instead of 53.6 (quoted:
  [issue 443](https://github.com/microsoft/unilm/issues/443)).
- **DeepSpeed**: the published fine-tunings used it. The commands here do without; `--enable_deepspeed` brings it back.
- **Precision**: the published runs used fp16. Here it is bf16 where the GPU has it, fp16 on a V100
  (`--amp_dtype fp16` asks for it), for the same memory.
- **How close is close**: users have reproduced segmentation within half a point of mIoU (quoted). For the other rows no
  tolerance was published.
"""

MEMORY = """\
## What fits on which GPU

`--gpu-memory` chooses the largest batch that fits **by an estimate on the safe side** (`beit/commands/memory.py`):
{per} bytes for each trained parameter (weight, gradient, buffers of DistributedDataParallel, Adam's moments, 16-bit
copy), and for each image and block {value} bytes a value and {weight} an attention weight, as if no kernel recomputed
the latter; heads and tokenizer on top, and a tenth of the card left alone. GB are 10^9 bytes. For segmentation at 640
pixels with the published batch it comes to {base:.1f} GB (base) and {large:.1f} GB (large) without the {context:.1f} GB
that CUDA takes for itself. mmsegmentation quotes 15.88 and 22.64 from PyTorch's counter; taken as 2^30 bytes, those are
17.1 and 24.3 GB, to which the heads' part is fitted. If the first step fits with room to spare, take more images and a
smaller `update_freq`. Most images per GPU, by the estimate:

"""

ABLATIONS_CHANGE, REFERENCE = "pretrain_base_1k_300ep", "pretrain_ablation_beit"
ABLATIONS = f"""\
## Ablations of the paper

Runs that change a part of the method. The reference, `{REFERENCE}`, is `{ABLATIONS_CHANGE}` with
the settings in its row; the others are the reference with theirs. They are shared out over GPUs in the same way.
`beit recipes show NAME` says from which table a row is, `beit recipes command NAME --gpus N` how it is run, and the
last column what `run_class_finetuning.py` builds the same model with. The paper has two heads for ADE20K, SETR-PUP in
table 4 and UPerNet in table 5: compare within a column.

"""

OUTSIDE = """\
## Published results without a recipe

- BEiT-large, pre-trained on ImageNet-22k (`beit_large_patch16_224_pt22k`): neither its command nor its settings were
  published, only the weights. Recipes start from them by name.
- ImageNet-1k only, at 384 pixels: 84.6 (base) and 86.3 (large), after fine-tuning at 224 pixels (83.2 and 85.2; paper,
  table 1). The paper fine-tunes 10 more epochs with DeiT's settings for higher resolutions and names no learning rate.
  For 224 pixels it has table 13: base as `finetune_ablation_224`; large with 50 epochs, 5 of them warm-up, layer decay
  0.75, and no repeated augmentation.
- SETR-PUP on ADE20K, the paper's own head: 45.6 mIoU, 47.7 after intermediate fine-tuning on ImageNet-1k (table 3). Its
  settings (table 14) are the config `setr_pup_beit_base_12_512_slide_160k_ade20k` of segmentation's launcher.
- The row "- Masking + Recover 100% visual tokens" of the paper's ablations (table 4): 81.67 on ImageNet, 36.73 mIoU
  with SETR-PUP. It masks nothing, and `--num_mask_patches 0` is refused here: the metrics of masked patches would be
  means over none, and in any other run it is a mistake.
- CIFAR-100 (90.1, after intermediate fine-tuning 91.8; table 11) and pre-training together with DINO (table 10).
"""


def document() -> str:
    """Returns the page as Markdown."""
    recipes = [read_recipe(name) for name in recipe_names()]
    rows = [recipe for recipe in recipes if not recipe.ablates]
    parts = [HEAD]
    for task in TASKS:
        ours = [recipe for recipe in rows if recipe.task == task]
        parts += [f"## {task.capitalize()}\n", _overview(ours), _shares(ours), *map(_section, ours)]
    parts += [_ablations([recipe for recipe in recipes if recipe.ablates])]
    return "\n".join([*parts, _memory_section(rows), OUTSIDE])


def _ablations(recipes: Sequence[Recipe]) -> str:
    if not recipes:
        return ""
    reference, usual = (read_recipe(name) for name in (REFERENCE, ABLATIONS_CHANGE))
    results = dict.fromkeys(key for recipe in (reference, *recipes) for key in recipe.facts["quoted"])
    rows = [
        (
            f"`{recipe.name}`",
            _difference(recipe, usual if recipe.name == REFERENCE else reference),
            *(_result(recipe, key) for key in results),
            f"`{recipe.facts['fine_tuned_with']}`",
        )
        for recipe in sorted(recipes, key=lambda recipe: recipe.name != REFERENCE)
    ]
    return ABLATIONS + _table(("recipe", "settings", *results, "fine-tuned with"), rows)


def _result(recipe: Recipe, key: str) -> str:
    return ", ".join(f"{metric} {value}" for metric, value in recipe.facts["quoted"].get(key, {}).items())


def _difference(recipe: Recipe, other: Recipe) -> str:
    changed = {key: value for key, value in recipe.own.items() if other.settings[key] != value}
    return ", ".join(f"`{key}: {value}`" for key, value in changed.items())


def _overview(recipes: Sequence[Recipe]) -> str:
    if not recipes[0].trains:
        rows = [(_link(r), r.facts["start"], r.expected()) for r in recipes]
        return _table(("recipe", "of", "quoted result"), rows)
    head = ("recipe", "model", "batch", "lr", "length", "quoted result", "published hardware", "time")
    runs = [
        (
            *(_link(r), f"`{r.settings['model']}`", str(r.batch), _rate(r), _length(r), r.expected()),
            *(r.facts.get("hardware", ""), r.facts.get("time", "")),
        )
        for r in recipes
    ]
    return _table(head, runs)


def _section(recipe: Recipe) -> str:
    about = f"### {recipe.name}\n\nSource: {recipe.facts['source']}. Data: {recipe.facts.get('data', '')}.\n"
    if "note" in recipe.facts:
        about += f"Note: {recipe.facts['note']}.\n"
    return f"{about}\n```bash\n{command(recipe, plan(recipe, recipe.facts['gpus']))}\n```\n"


def _shares(recipes: Sequence[Recipe]) -> str:
    if not recipes[0].trains:
        return "Any number of GPUs gives the same result.\n"
    rows = [(f"`{recipe.name}`", *(_share(recipe, gpus) for gpus in GPU_COUNTS)) for recipe in recipes]
    head = ("images per GPU x `update_freq`", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPU_COUNTS))
    return _table(head, rows) + "\nThe commands are for the published number of GPUs.\n"


def _share(recipe: Recipe, gpus: int) -> str:
    if not recipe.can_run_on(gpus):
        return ""
    how = plan(recipe, gpus)
    return f"{how.images} x {how.update_freq}"


def _memory_section(recipes: Sequence[Recipe]) -> str:
    works = {_kind(recipe): workload(recipe) for recipe in recipes if recipe.trains}
    rows = [(kind, *(_fit(work, size) for size in CARDS.values())) for kind, work in sorted(works.items())]
    by_name = {recipe.name: recipe for recipe in recipes}
    peaks = {
        size: (memory.needed(workload(recipe), recipe.images) - memory.CONTEXT) / 1e9
        for size in ("base", "large")
        for recipe in [by_name[f"segment_{size}_640_pt2ft"]]
    }
    text = MEMORY.format(
        per=memory.PER_PARAMETER[memory.AMP],
        value=memory.PER_VALUE[memory.AMP],
        weight=memory.PER_ATTENTION_WEIGHT[memory.AMP],
        context=memory.CONTEXT / 1e9,
        **peaks,
    )
    in_brackets = any("(" in fit for _, *fits in rows for fit in fits)
    note = "\nIn brackets: with activation checkpointing, where nothing fits without it.\n" if in_brackets else ""
    return text + _table(("run", *CARDS), rows) + note


def _kind(recipe: Recipe) -> str:
    size = recipe.settings["model"].split("_")[1]
    pixels = recipe.settings.get("input_size") or 224
    return f"{recipe.task}, {size}, {pixels} pixels"


def _fit(work: memory.Workload, gigabytes: float) -> str:
    fit = memory.images_that_fit(work, gigabytes)
    if fit:
        return str(fit)
    fit = memory.images_that_fit(work, gigabytes, checkpointing=True)
    return f"({fit})" if fit else "none"


def _rate(recipe: Recipe) -> str:
    return f"{recipe.settings['lr']:g}" if recipe.settings.get("lr") else "in the config"


def _length(recipe: Recipe) -> str:
    updates = recipe.facts.get("updates")
    return f"{updates['max_iters'] // 1000}k updates" if updates else f"{recipe.settings['epochs']} epochs"


def _link(recipe: Recipe) -> str:
    return f"[`{recipe.name}`](#{recipe.name})"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
