"""A picture as a vision model's input: the grid from the config, what is read, and every way it can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from core.errors import BadInput
from core.images import pictures
from core.images.digits import HELD_OUT, N_ROWS, digit
from core.images.pictures import read_picture
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.patch_grid import patch_grid
from core.probes._image import encode_image
from core.registry import methods
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder, tiny_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "options", "rows", "columns", "special"),
    [
        ("ViT", {"image_size": 32, "patch_size": 8}, 4, 4, 1),
        ("ViT", {"image_size": 30, "patch_size": 8}, 3, 3, 1),
        ("ViT", {"image_size": (16, 24), "patch_size": (8, 4)}, 2, 6, 1),
        ("DeiT", {"image_size": 32, "patch_size": 16}, 2, 2, 2),
        ("Dinov2WithRegisters", {"image_size": 28, "patch_size": 14, "num_register_tokens": 4}, 2, 2, 5),
    ],
)
def test_the_grid_is_the_models_own(
    kind: str, options: dict[str, object], rows: int, columns: int, special: int
) -> None:
    """Patches + special tokens are the positions the model really makes; 14 × 14 is never assumed."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    size = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
    with torch.inference_mode():
        made = model(pixel_values=torch.zeros(1, 3, *size)).last_hidden_state.shape[1]
    grid = patch_grid(config)
    assert (grid.rows, grid.columns, len(grid.special)) == (rows, columns, special)
    assert grid.n_tokens == made
    assert grid.special[0] == "[CLS]"


def test_a_digit_is_seen_as_it_is_stored(tmp_path: Path) -> None:
    loaded = open_model(ModelRef.parse("demo:vit"))
    encoded = encode_image(loaded, Prompt(image="digits:1348"))
    grey, label = digit(1348)
    assert encoded.picture.label == str(label) == "7"
    assert (encoded.seen_HWC == grey[..., None]).all()
    values = encoded.inputs["pixel_values"][0, 0].numpy()
    assert values == pytest.approx(grey / 255 * 2 - 1, abs=1e-6)
    assert encoded.notes == ()
    drawn = np.array(Image.open(io.BytesIO(encoded.png())))
    assert drawn.shape == (224, 224, 3)
    assert (drawn[::28, ::28, 0] == grey).all()
    same = tmp_path / "same.png"
    Image.fromarray(grey).save(same)
    again = encode_image(loaded, Prompt(image=str(same)))
    assert torch.equal(again.inputs["pixel_values"], encoded.inputs["pixel_values"])


def test_another_size_is_resized_and_said() -> None:
    (note,) = encode_image(tiny_model("vit"), Prompt(image="digits:3")).notes
    assert "from 8 × 8 to 32 × 32" in note


def test_a_frame_places_patches_row_by_row() -> None:
    encoded = encode_image(tiny_model("vit"), Prompt(image="digits:3"))
    frame = encoded.patch_frame(np.arange(16))
    scale = encoded.enlarged * 8
    assert frame.loc[6, ["row", "column", "x", "y"]].tolist() == [1, 2, 2 * scale, scale]
    assert encoded.texts[0] == "[CLS]"
    assert encoded.texts[1 + 6] == "row 1, column 2"


class TestPictures:
    def test_transparent_parts_are_white(self, tmp_path: Path) -> None:
        path = tmp_path / "clear.png"
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(path)
        picture = read_picture(str(path))
        assert picture.image.getpixel((0, 0)) == (255, 255, 255)
        assert "white" in picture.notes[0]

    def test_a_phone_picture_is_turned_upright(self, tmp_path: Path) -> None:
        path = tmp_path / "turned.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (10, 20)).save(path, exif=exif)
        assert read_picture(str(path)).size == (20, 10)

    @pytest.mark.parametrize("source", ["digits:", "digits:-1", "digits:1.5", "digits:²", f"digits:{N_ROWS}"])
    def test_rows_that_do_not_exist(self, source: str) -> None:
        with pytest.raises(BadInput, match=r"digits:"):
            read_picture(source)

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"GIF89a" + bytes(20), b"%PDF-1.4"])
    def test_files_that_are_no_picture(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"broken.png is (not a picture|damaged)"):
            read_picture(str(path))

    @pytest.mark.parametrize("kept", [60, 400])
    def test_a_picture_cut_short(self, kept: int, tmp_path: Path) -> None:
        path = tmp_path / "short.png"
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(BadInput, match=r"short.png is (not a picture|damaged)"):
            read_picture(str(path))

    def test_too_many_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "large.png"
        Image.new("L", (20, 20)).save(path)
        monkeypatch.setattr(pictures, "MAX_PIXELS", 399)
        with pytest.raises(BadInput, match="20 × 20 pixels, more than 399"):
            read_picture(str(path))

    def test_sixteen_bits_would_be_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "deep.png"
        Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(path)
        with pytest.raises(BadInput, match="more than 8 bits"):
            read_picture(str(path))

    @pytest.mark.parametrize("source", ["", "nowhere.png", "/", "a\x00b"])
    def test_no_such_file(self, source: str) -> None:
        with pytest.raises(BadInput, match="no image file"):
            read_picture(source)


def test_a_picture_of_the_wrong_size_is_refused_where_nothing_resizes(tmp_path: Path) -> None:
    folder = tiny_folder("vit", tmp_path)
    transformers.ViTImageProcessorPil(do_resize=False).save_pretrained(folder)
    loaded = open_model(ModelRef(str(folder)))
    with pytest.raises(BadInput, match=r"8 × 8 pixels.*takes 32 × 32; resize"):
        encode_image(loaded, Prompt(image="digits:3"))
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 32}).save_pretrained(folder)
    with pytest.raises(BadInput, match=r"gives .* 32 × 16, but it takes 32 × 32"):
        encode_image(open_model(ModelRef(str(folder))), Prompt(image="digits:3"))


def test_a_model_without_processor_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder("vit", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BadInput, match=r"no preprocessor_config.json"):
        encode_image(open_model(ModelRef(str(folder))), Prompt(image="digits:3"))


def _takes(loaded: LoadedModel) -> list[str]:
    """The probes of this model that look at the prompt."""
    fitting = [(id_, m) for id_, m in methods("probe").items() if not loaded.missing_needs(m.needs)]
    return [id_ for id_, m in fitting if m.parse({}).reads_prompt]


@pytest.mark.parametrize("id_", _takes(tiny_model("vit")))
def test_every_probe_a_vision_model_offers_refuses_text(id_: str) -> None:
    method = methods("probe")[id_]
    if method.takes_reference:
        pytest.skip("asked with two models")
    with pytest.raises(BadInput, match="reads no text"):
        method.run(tiny_model("vit"), Prompt("a text"), silent, method.parse({}))


@pytest.mark.parametrize(
    "id_", [id_ for id_ in _takes(tiny_model("vit")) if id_ in _takes(tiny_model("llama"))]
)
def test_every_probe_of_both_refuses_an_image_on_text(id_: str) -> None:
    method = methods("probe")[id_]
    if method.takes_reference:
        pytest.skip("asked with two models")
    with pytest.raises(BadInput, match="takes no image"):
        method.run(tiny_model("llama"), Prompt("a text", image="digits:3"), silent, method.parse({}))


def test_held_out_rows_are_the_last_quarter() -> None:
    assert HELD_OUT.stop == N_ROWS
    assert len(HELD_OUT) == 450


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    from core.images.digits import all_digits, grey_levels

    known = datasets.load_digits()
    levels, labels = all_digits()
    assert (labels == known.target).all()
    assert (levels == grey_levels(known.images.astype(np.uint8))).all()
