"""`beit push`: the folder opens in three libraries by the card's own words, and a hub on this machine receives it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from beit.__main__ import main
from beit.config import dump_yaml
from beit.modeling import VisionTransformer, VisionTransformerForMaskedImageModeling
from beit.storage import save_checkpoint
from beit.tasks.settings import FinetuningConfig
from beit.zoo import get_model
from semantic_segmentation.modeling import build_segmentor

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 5, "num_heads": 2, "init_values": 0.1}
TOKEN = "hf_secretsecretsecret"


def random_(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def classifier():
    return random_(VisionTransformer(use_abs_pos_emb=False, use_rel_pos_bias=True, num_classes=3, **SIZES))


def pretrained():
    options = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "vocab_size": 8}
    return random_(VisionTransformerForMaskedImageModeling(**options, **SIZES))


def segmentor():
    heads = {"num_classes": 4, "channels": 32, "auxiliary_channels": 16, "out_indices": (0, 1, 2, 3)}
    return random_(build_segmentor(use_abs_pos_emb=False, use_rel_pos_bias=True, **heads, **SIZES))


def saved(model, path, **recorded):
    args = {"input_size": 32, "crop_size": 32, "out_indices": [0, 1, 2, 3], "model_kwargs": {"num_heads": 2}}
    save_checkpoint(path, {"model": model.state_dict(), "args": args, **recorded})
    return str(path)


@pytest.fixture
def run(tmp_path):
    """A run of fine-tuning: its best checkpoint is of the second of three epochs."""
    folder = tmp_path / "my run"
    folder.mkdir()
    config = FinetuningConfig(
        data_path="/home/alice/secret/pets", lr=3e-3, epochs=3, init_from="https://u:pw@x.org/a.pth?sig=abc", aa="a|b<c"
    )
    (folder / "config.yaml").write_text(dump_yaml(config))
    entries = [
        {"epoch": k, "train_loss": 2.0 - k, "test_acc1": (50.0, 70.5, 60.0)[k], "n_parameters": 7} for k in range(3)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "environment.json").write_text(
        json.dumps({"command": ["beit", "finetune", "--config", "finetune_base_pt22k_224"]})
    )
    saved(classifier(), folder / "checkpoint-best.pth", epoch=1, labels=["cat", "dog", "owl"], optimizer={})
    saved(classifier(), folder / "checkpoint-2.pth", epoch=2, labels=["cat", "dog", "owl"], optimizer={})
    return folder


def push(*words):
    return main(["push", *map(str, words)])


def card_of(folder):
    return huggingface_hub.ModelCard.load(folder / "README.md")


def code_of(card, library):
    return re.search(rf"With {library}.*?```python\n(.*?)```", card.text, re.DOTALL)[1]


@pytest.mark.parametrize("build", [classifier, pretrained, segmentor])
def test_the_code_on_the_card_runs_in_each_library_with_equal_logits(build, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    source = saved(model := build(), tmp_path / "x.pth", mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0)
    assert push(source, "me/my-model", "--dry_run", tmp_path / "folder") == 0
    found = {}
    for library in ("BEiT", "transformers", *(["timm"] if build is not segmentor else [])):
        code = code_of(card_of(tmp_path / "folder"), library)
        code = code.replace("me/my-model", str(tmp_path / "folder")).replace("image.jpg", str(tmp_path / "image.png"))
        monkeypatch.chdir(tmp_path)
        if library == "timm":
            assert main(["convert", str(tmp_path / "folder"), "model", "--to", "timm"]) == 0
        exec(code, found.setdefault(library, {}))
    images = (torch.from_numpy(pixels).movedim(-1, 0)[None] / 255 - 0.5) / 0.5
    theirs = found["transformers"]
    assert torch.allclose(theirs["inputs"]["pixel_values"], images, atol=1e-5)
    with torch.no_grad():
        if build is classifier:
            assert torch.allclose(theirs["logits"], model(images), atol=1e-5)
            assert torch.allclose(found["timm"]["model"].eval()(images), model(images), atol=1e-5)
            assert len(found["BEiT"]["classes"]) == 3
        elif build is pretrained:
            assert torch.allclose(theirs["logits"], model(images, theirs["masked"]), atol=1e-5)
            assert found["BEiT"]["features"].shape == (1, 32)
        else:
            assert torch.allclose(theirs["logits"], model.decode_head(model.backbone(images)), atol=1e-5)
            assert found["BEiT"]["classes"].shape == (32, 32)


def test_the_card_states_what_the_run_measured_beside_what_was_quoted_and_no_path(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "panels.png")
    words = ["--license", "mit", "--datasets", "my/pets", "--pictures", tmp_path / "panels.png"]
    assert push(run, "me/pets", "--dry_run", tmp_path / "folder", *words) == 0
    card = card_of(tmp_path / "folder")
    header = card.data.to_dict()
    assert (header["license"], header["library_name"]) == ("mit", "transformers")
    assert (header["pipeline_tag"], header["datasets"]) == ("image-classification", ["my/pets"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.705, "my/pets")
    text = card.text.replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r"\| top-1 accuracy \| 70.50 % \| 83.70? % \|", text), text  # at the best epoch, not the last
    assert "| `lr` | 0.003 |" in text
    assert "a&#124;b&lt;c" in text
    assert "pets (3 classes)" in text
    assert text.count("| parameters |") == 1
    assert not re.search("alice|secret|pw@|sig=|/home", str(card))
    for picture in re.findall(r"!\[.*?\]\(<(.*?)>\)", card.text):
        with Image.open(tmp_path / "folder" / picture) as image:
            image.load()
    assert {"training_curves.png", "panels.png"} == {path.name for path in (tmp_path / "folder").glob("*.png")}
    assert not re.search(r"\n\n\n|\|\n\n\|", card.text)  # tables stay whole


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which keeps what is committed; ``public`` repositories are there already."""

    class Hub(BaseHTTPRequestHandler):
        files, asked, public, invalid = {}, [], set(), ""

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked.append((self.path, self.headers.get("Authorization")))
            if self.path == "/api/validate-yaml":
                yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
                self.answer({"errors": [], "warnings": []}, 400 if self.invalid else 200, self.invalid.encode())
            elif self.path == "/api/repos/create":
                self.answer({"url": f"{address}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
            elif self.path.endswith("/preupload/main"):
                kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self.answer({"files": [{"path": file["path"], **kept} for file in json.loads(body)["files"]]})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{address}/me/x/commit/1", "commitOid": "1" * 40, "success": True})

        def do_GET(self):
            self.asked.append((self.path, self.headers.get("Authorization")))
            if self.path.startswith("/api/models/"):
                self.answer({"id": "me/x", "private": self.path.rpartition("/")[2] not in self.public, "siblings": []})
            else:
                name = self.path.partition("/resolve/main/")[2]
                self.answer(None, 200 if name in self.files else 404, self.files.get(name, b""))

        do_HEAD = do_GET

        def answer(self, content, status=200, body=b""):
            body = body or json.dumps(content).encode()
            self.send_response(status)
            extra = {
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Repo-Commit": "1" * 40,
                "Content-Type": "application/json",
            }
            extra |= {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
            for key, value in {**extra, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("BEIT_HOME", str(tmp_path / "home"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_pushed_model_opens_by_its_hub_id(hub, run, capfd):
    assert push(run, "me/pets", "--private") == 0
    assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"} <= hub.files.keys()
    order = [path for path, _ in hub.asked]
    assert order.index("/api/validate-yaml") < order.index("/api/repos/create")  # a bad card makes no repository
    assert ("/api/models/me/pets/commit/main", f"Bearer {TOKEN}") in hub.asked
    opened, original = get_model("me/pets"), get_model(run / "checkpoint-best.pth")
    images = torch.randn(1, 3, 32, 32)
    assert torch.allclose(opened(images), original(images), atol=1e-5)
    assert opened.metadata["labels"] == ("cat", "dog", "owl")
    assert TOKEN not in "".join(capfd.readouterr())


def test_the_code_for_other_channels_than_colours_runs(tmp_path, monkeypatch):
    model = random_(VisionTransformer(use_abs_pos_emb=False, use_rel_pos_bias=True, num_classes=3, in_chans=5, **SIZES))
    source = saved(model, tmp_path / "x.pth", mean=[0.5] * 5, std=[0.5] * 5)
    assert push(source, "me/my-model", "--dry_run", tmp_path / "folder") == 0
    np.save(tmp_path / "image.npy", np.zeros((32, 32, 5), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    for library in ("BEiT", "transformers"):
        code = code_of(card_of(tmp_path / "folder"), library)
        exec(code.replace("me/my-model", str(tmp_path / "folder")), found := {})
        assert len(found["classes"]) == 3 if library == "BEiT" else found["logits"].shape == (1, 3)


def test_what_the_hub_refuses_is_one_line_and_a_public_repository_gets_nothing_private(hub, run, capfd):
    hub.public.add("pets")
    assert push(run, "me/pets", "--private") == 2
    assert "exists and is public" in capfd.readouterr().err
    hub.invalid = '"license" must be one of [...]'
    assert push(run, "me/pets", "--license", "nonsense") == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "me/pets was not pushed" in error
    assert "license" in error
    assert not hub.files


def test_mistakes_are_one_line_and_write_nothing(run, tmp_path, monkeypatch, capfd):
    def refused(*words):
        assert push(*words) == 2
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in refused(run, "me/pets")
    assert "owner" in refused(run, "pets", "--dry_run", tmp_path / "new")
    assert "no name of a repository" in refused(run, "me/a b", "--dry_run", tmp_path / "new")
    assert "empty folder" in refused(run, "me/pets", "--dry_run", run)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    damaged = ("--pictures", tmp_path / "cut.png")
    assert "cut.png" in refused(run, "me/pets", "--dry_run", tmp_path / "new", *damaged)
    monkeypatch.setenv("BEIT_OFFLINE", "1")
    assert "BEIT_OFFLINE" in refused(run, "me/pets")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(run, "me/pets")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_asks_nobody(run, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("contacted"))
    assert push(run, "me/pets", "--dry_run", tmp_path / "folder") == 0
    assert load_file(tmp_path / "folder" / "model.safetensors")
