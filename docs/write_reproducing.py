"""Writes docs/reproducing.md and reproducing_v2.md from beit/recipes/*.yaml: ``python docs/write_reproducing.py``."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from beit.commands.recipes import Recipe, command, read_recipe
from beit.commands.settings import RECIPE_TASKS
from beit.config import recipe_names

PAGES = {"reproducing.md": False, "reproducing_v2.md": True}  # whether it is about BEiT v2
EXAMPLES = {  # the command that stands for all of a task; of BEiT v2's it is the first
    "pre-training": "pretrain_base_1k_800ep",
    "intermediate fine-tuning": "finetune_base_22k",
    "fine-tuning": "finetune_base_pt22k_224",
    "linear probe": "linear_probe_base",
    "segmentation": "segment_base_640_pt2ft",
    "segmentation test": "segment_base_640_ms",
}

HEAD = """\
# Reproducing the published results

<!-- Written by docs/write_reproducing.py from beit/recipes/*.yaml: change those and run it. A test compares. -->

Every published row is a recipe:

```bash
beit recipes list                                     # all of them; --task 'linear probe' for one task
beit recipes show finetune_base_pt22k_224             # settings, source, quoted results, command
beit recipes show finetune_base_pt22k_224 --gpus 2    # the command for 2 GPUs
```

Replace `/path/to/...` by your paths. A recipe sets `total_batch_size`, the published number of images per optimizer
step, which its learning rate belongs to. The job splits it over the GPUs and accumulates gradients over as many batches
as needed, so the same command is right for any number of GPUs that divides it. `batch_size` is the maximum per GPU: if
memory runs out, give a lower `--batch_size`, and nothing else changes.

**All results on this page are quoted** from the sources named beside them; none has been measured with this library.
The tests check that each command, as its launcher reads it, means exactly the published settings.

## Before you start

- **Fewer GPUs are slower, and otherwise equivalent** except for segmentation. The published times are for the
  published hardware.
- **Segmentation differs**: batch norm in its heads sees the images of one forward pass over all GPUs: 16 as published
  (8 in `segment_large_640_pt2ft`). On fewer GPUs it sees fewer, and accumulating gradients does not make up for that. A
  user who trained `segment_base_640_pt2ft` on one GPU with 2 images per step got 48.9 mIoU instead of 53.6 (quoted:
  [issue 443](https://github.com/microsoft/unilm/issues/443)).
- **Several machines**: start the command once per machine with torchrun's `--nnodes` and `--rdzv_endpoint`
  ([clusters.md](clusters.md)); for segmentation set `NNODES`, `NODE_RANK` and `MASTER_ADDR`.
- **DeepSpeed**: the published fine-tuning runs used it. These commands do not; `--enable_deepspeed` turns it on.
- **Precision**: the published runs used fp16. Here it is bf16 where the GPU supports it and fp16 otherwise;
  `--amp_dtype fp16` forces it.
- **Tolerance**: users have reproduced segmentation within half a point of mIoU (quoted). For the other rows no
  tolerance was published.
"""

HEAD_V2 = """\
# Reproducing the published results of BEiT v2

<!-- Written by docs/write_reproducing.py from beit/recipes/*.yaml: change those and run it. A test compares. -->

[reproducing.md](reproducing.md) says how to use these recipes, and what is quoted; [beit_v2.md](beit_v2.md) says what
BEiT v2 is. All runs are on ImageNet at 224 pixels and on ADE20K at 512.
"""
OUTSIDE_V2 = """
## Published results without a recipe

- The linear probe of base after 1600 epochs (80.1): no settings were published.
- Detection on COCO: "under preparation" since 2022.
"""

REFERENCE, USUAL = "pretrain_ablation_beit", "pretrain_base_1k_300ep"
ABLATIONS = f"""\
## Ablations of the paper

The reference, `{REFERENCE}`, is `{USUAL}` with the settings in its row; the others are the reference with theirs.
`beit recipes show NAME` names the table each row is from. The last column has the flags with which
`run_class_finetuning.py` builds the same model. The paper has two heads for ADE20K, SETR-PUP in table 4 and UPerNet in
table 5: compare within a column.

"""

OUTSIDE = """
## Published results without a recipe

- BEiT-large, pre-trained on ImageNet-22k (`beit_large_patch16_224_pt22k`): neither its command nor its settings were
  published, only the weights. Recipes start from them by name.
- ImageNet-1k only, at 384 pixels: 84.6 (base) and 86.3 (large), after fine-tuning at 224 pixels (83.2 and 85.2; paper,
  table 1). The paper fine-tunes 10 more epochs with DeiT's settings for higher resolutions and gives no learning rate.
  For 224 pixels it has table 13: base as `finetune_ablation_224`; large with 50 epochs, 5 of them warm-up, layer decay
  0.75, and no repeated augmentation.
- SETR-PUP on ADE20K, the paper's own head: 45.6 mIoU, 47.7 after intermediate fine-tuning on ImageNet-1k (table 3). Its
  settings (table 14) are the segmentation config `setr_pup_beit_base_12_512_slide_160k_ade20k`.
- The row "- Masking + Recover 100% visual tokens" of the paper's ablations (table 4): 81.67 on ImageNet, 36.73 mIoU
  with SETR-PUP. It masks nothing, and `--num_mask_patches 0` is refused here: the metrics of masked patches would be
  means over none, and in any other run it is a mistake.
- CIFAR-100 (90.1, after intermediate fine-tuning 91.8; table 11) and pre-training together with DINO (table 10).
"""


def document(v2: bool = False) -> str:
    """Returns a page as Markdown, of BEiT or of BEiT v2."""
    recipes = [read_recipe(name) for name in recipe_names() if ("_v2_" in name or name.startswith("vqkd_")) == v2]
    ablations = [recipe for recipe in recipes if recipe.name.startswith("pretrain_ablation_")]
    parts = [HEAD_V2 if v2 else HEAD]
    for task in dict.fromkeys(task for task in RECIPE_TASKS for recipe in recipes if recipe.task == task):
        parts.append(_section([recipe for recipe in recipes if recipe.task == task and recipe not in ablations]))
    return "\n".join(parts) + (OUTSIDE_V2 if v2 else "\n" + _ablations(ablations) + OUTSIDE)


def _section(recipes: Sequence[Recipe]) -> str:
    task = recipes[0].task
    example = next((recipe for recipe in recipes if recipe.name == EXAMPLES.get(task)), recipes[0])
    head: tuple[str, ...] = (
        "recipe",
        "model",
        "images per step",
        "lr",
        "length",
        "quoted result",
        "published hardware",
    )
    rows: list[tuple[object, ...]] = [
        (f"`{r.name}`", f"`{r.settings['model']}`", r.batch, _rate(r), _length(r), r.expected(), _hardware(r))
        for r in recipes
    ]
    if not example.trains:
        head = ("recipe", "of", "quoted result")
        rows = [(f"`{r.name}`", r.fact("start"), r.expected()) for r in recipes]
    about: dict[str, list[str]] = {}
    for r in recipes:
        about.setdefault(f"{r.fact('source')}.{_sentence(r.fact('note'))}", []).append(f"`{r.name}`")
    title = task[0].upper() + task[1:]
    return (
        f"## {title}\n\n{_table(head, rows)}\n{_data(recipes)}. The command of `{example.name}`; others "
        f"differ in the name, the data and what they start from:\n\n```bash\n{command(example, example.gpus)}\n```\n\n"
        "Sources and notes:\n\n" + "".join(f"- {', '.join(names)}: {text}\n" for text, names in about.items())
    )


def _data(recipes: Sequence[Recipe]) -> str:
    return "Data: " + "; ".join(dict.fromkeys(recipe.fact("data") for recipe in recipes))


def _sentence(text: str) -> str:
    return f" {text[0].upper()}{text[1:]}." if text else ""


def _hardware(recipe: Recipe) -> str:
    time = recipe.fact("time")
    return recipe.fact("hardware") + (f", {time}" if time not in ("", "not published") else "")


def _rate(recipe: Recipe) -> str:
    return f"{recipe.settings['lr']:g}" if recipe.settings.get("lr") else "in the config"


def _length(recipe: Recipe) -> str:
    steps = recipe.facts.get("max_steps")
    return f"{int(str(steps)) // 1000}k steps" if steps else f"{recipe.settings['epochs']} epochs"


def _ablations(recipes: Sequence[Recipe]) -> str:
    reference, usual = read_recipe(REFERENCE), read_recipe(USUAL)
    results = dict.fromkeys(key for recipe in (reference, *recipes) for key in recipe.quoted)
    rows = [
        (
            f"`{recipe.name}`",
            _difference(recipe, usual if recipe.name == REFERENCE else reference),
            *(_result(recipe, key) for key in results),
            f"`{recipe.fact('fine_tuned_with')}`",
        )
        for recipe in sorted(recipes, key=lambda recipe: recipe.name != REFERENCE)
    ]
    return ABLATIONS + _table(("recipe", "settings", *results, "fine-tuned with"), rows)


def _result(recipe: Recipe, key: str) -> str:
    found = recipe.quoted.get(key)
    return ", ".join(f"{metric} {value}" for metric, value in found.items()) if isinstance(found, Mapping) else ""


def _difference(recipe: Recipe, other: Recipe) -> str:
    changed = {key: value for key, value in recipe.own.items() if other.settings[key] != value}
    return ", ".join(f"`{key}: {value}`" for key, value in changed.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    for name, v2 in PAGES.items():
        Path(__file__).with_name(name).write_text(document(v2), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")
