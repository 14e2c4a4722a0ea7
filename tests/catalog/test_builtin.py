"""What ships is found by name, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from molecli.catalog import builtin as catalog
from molecli.errors import UsageError
from molecli.files.concepts import read_concept


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with one base, two LoRAs and no recipes of its own."""
    for folder, marker in [
        ("tiny-t5", "config.json"),
        ("loras/alphabet", "adapter_config.json"),
        ("loras/number", "adapter_config.json"),
    ]:
        (tmp_path / "molecli" / "builtin" / folder).mkdir(parents=True)
        (tmp_path / "molecli" / "builtin" / folder / marker).write_text("{}")
    (tmp_path / "molecli" / "builtin" / "loras" / "notes").mkdir()
    monkeypatch.setattr(catalog, "package_folder", lambda: tmp_path / "molecli")
    return tmp_path / "molecli"


@pytest.mark.parametrize("name", ["tiny-t5", "builtin:tiny-t5"])
def test_a_builtin_base_is_found(name: str, package: Path) -> None:
    assert catalog.builtin_base(name) == package / "builtin" / "tiny-t5"


def test_an_unknown_builtin_base_is_explained(package: Path) -> None:
    with pytest.raises(UsageError) as caught:
        catalog.builtin_base("builtin:huge")
    assert str(caught.value) == "builtin:huge: no such built-in base. Known: builtin:tiny-t5."
    assert caught.value.exit_code == 2


def test_builtin_loras_come_in_order(package: Path) -> None:
    assert list(catalog.builtin_loras().items()) == [
        ("alphabet", package / "builtin" / "loras" / "alphabet"),
        ("number", package / "builtin" / "loras" / "number"),
    ]


@pytest.mark.parametrize(
    ("name", "real"),
    [("a", "alphabet"), ("b", "number"), ("number", "number"), ("builtin:number", "number"), ("builtin:a", "alphabet")],
)
def test_a_builtin_lora_is_found_by_name_and_by_letter(name: str, real: str, package: Path) -> None:
    assert catalog.builtin_lora(name) == (real, package / "builtin" / "loras" / real)


@pytest.mark.parametrize("name", ["c", "notes", "", "ab", "runs/a"])
def test_other_names_are_no_builtin_lora(name: str, package: Path) -> None:
    assert catalog.builtin_lora(name) is None


def test_nothing_ships_in_an_empty_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "package_folder", lambda: tmp_path / "empty")
    assert catalog.builtin_loras() == {}
    assert catalog.recipes() == {}


@pytest.mark.parametrize("place", ["molecli/recipes", "recipes"])
def test_recipes_are_found_inside_the_package_and_beside_it(place: str, package: Path) -> None:
    file = package.parent / place / "text" / "demo.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("command: compose\n")
    assert catalog.recipes() == {"text/demo": file}


def test_every_shipped_builtin_lora_belongs_to_a_folder_with_weights() -> None:
    for folder in catalog.builtin_loras().values():
        assert (folder / "adapter_model.safetensors").is_file()


def test_the_embedded_image_default_is_small_and_names_no_path() -> None:
    folder = catalog.package_folder() / "builtin"
    parts = [f for name in ("tiny-sd", "tiny-clip", "recogniser") for f in (folder / name).rglob("*") if f.is_file()]
    assert 10e6 < sum(f.stat().st_size for f in parts) < 20e6
    loras = catalog.builtin_loras(catalog.BUILTIN_IMAGE_BASE)
    assert len(loras) >= 6
    for name, lora in loras.items():
        text = (lora / "concept.json").read_text()
        assert f'"../../emoji/{name}"' in text
        concept = read_concept(lora)
        assert concept is not None
        assert concept.pictures is not None
        assert len(list(Path(concept.pictures).glob("*.png"))) >= 3
