"""What a release is held to: light to import, whole as a wheel, silent on the network, tidy on the disk."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from sources import ROOT, copy_sources

IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import sparge_compile
print(time.perf_counter() - start, "torch._dynamo" in set(sys.modules) - before)
"""

# Everything that a user does, with a guard that refuses network connections.
USE = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        raise RuntimeError(f"network: {event} {arguments}")
sys.addaudithook(refuse)
import torch, sparge_compile as sparge
assert sys.argv[1] in sparge.__file__, sparge.__file__
class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
q, k, v = torch.randn(3, 1, 2, 256, 32).unbind()
with torch.no_grad():
    out = torch.compile(Model(), backend="sparge", options={"sparge.min_tokens": 64})(q, k, v)
    report = sparge.explain(Model(), q, k, v, policy=sparge.Policy(min_tokens=64))
assert len(report.rewritten) == len(sparge.last_report().rewritten) == 1, report
torch.testing.assert_close(out, Model()(q, k, v), atol=0.02, rtol=0.02)
"""


def run(*command, **kwargs):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280, **kwargs)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def environment(**variables):
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "CXX") if name in os.environ}
    return kept | {name: str(value) for name, value in variables.items()}


def test_importing_costs_less_than_50_ms_beyond_torch():
    seconds = []
    for _ in range(3):
        taken, dynamo = run(sys.executable, "-c", IMPORT, cwd=ROOT).split()
        seconds.append(float(taken))
        assert dynamo == "False"
    assert min(seconds) < 0.05, seconds


def test_every_public_name_is_there():
    import sparge_compile

    assert set(sparge_compile.__all__) <= set(dir(sparge_compile))
    assert all(getattr(sparge_compile, name).__name__ == name for name in sparge_compile.__all__)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = sparge_compile.nothing_of_this_name


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel that is built from that sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    copy_sources(source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "sparge_compile"), (ROOT / "kernels", "sparge_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == tracked
    assert {"sparge_compile/py.typed", "sparge_kernels/py.typed", "sparge_kernels/cpu/attention.cpp"} <= inside


def test_the_sdist_has_what_a_packager_needs(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "conftest.py", "tests/test_release.py"} <= inside


def test_the_wheel_installed_alone_compiles_a_model_offline_and_writes_only_to_caches(built, tmp_path):
    """torch comes from this environment, the package from the wheel; a fresh home and an empty working folder."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel)
    home, work, caches = tmp_path / "home", tmp_path / "work", tmp_path / "caches"
    for folder in (home, work, caches):
        folder.mkdir()
    before = sorted(site.rglob("*"))
    run(
        tmp_path / "venv" / "bin" / "python",
        "-c",
        USE,
        site,
        cwd=work,
        env=environment(
            PYTHONPATH=os.pathsep.join((str(site), sysconfig.get_paths()["purelib"])),
            PYTHONDONTWRITEBYTECODE=1,
            HOME=home,
            TORCHINDUCTOR_CACHE_DIR=caches / "inductor",
            TRITON_CACHE_DIR=caches / "triton",
            TORCH_EXTENSIONS_DIR=caches / "extensions",
        ),
    )
    assert list(home.rglob("*")) == list(work.iterdir()) == []
    assert sorted(site.rglob("*")) == before
    assert list((caches / "extensions").rglob("*.so"))
