"""The builder of the native kernel: never half a library, and a reason where there is none."""

import os
import re
import sys
from pathlib import Path

import pytest
from build_cases import BUILDING, files, forget, reason

from sparge_kernels.cpu import build

pytestmark = pytest.mark.skipif(build.fcntl is None, reason="nothing is built on Windows")


def test_builds_loads_and_calls(tmp_path, capfd):
    assert build.load().answer() == 42
    assert build.library_path().parent.parent == tmp_path / "cache" / "sparge_kernels"
    assert files() == ["build.log", "lock", "sparge_cpu.so"]
    assert re.fullmatch(BUILDING + r"done in \d+\.\d s\n", capfd.readouterr().err)


def test_a_library_that_is_there_needs_no_compiler_and_says_nothing(monkeypatch, capfd):
    first = build.load()
    assert build.load() is first
    capfd.readouterr()
    forget(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.load(accept=lambda library: "it was accepted before").answer() == 42
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cache", [None, "/elsewhere"], ids=["home", "XDG_CACHE_HOME"])
def test_the_default_folder_is_torchs(monkeypatch, cache):
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert str(build.library_path().parents[2]) == get_default_build_root()


def test_the_key_covers_sources_flags_and_cpu(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CPU_INFO", tmp_path / "cpuinfo")
    build.CPU_INFO.write_text("processor : 0\nflags\t\t: sse avx\nprocessor : 1\nflags : other\n")
    paths = [build.library_path(), build.library_path(extra=["-DX"]), build.library_path("-march=x86-64-v3")]
    build.CPU_INFO.write_text("flags : avx sse\n")
    assert build.library_path() == paths[0]
    changes = [
        lambda: build.CPU_INFO.write_text("Features\t: asimd\n"),
        build.CPU_INFO.unlink,
        lambda: (sources / "number.h").write_text("#define NUMBER 43\n"),
        lambda: (sources / "answer.cpp").rename(sources / "other.cpp"),
        lambda: monkeypatch.setattr(build.platform, "machine", lambda: "aarch64"),
    ]
    for change in changes:
        change()
        paths.append(build.library_path())
    assert len(set(paths)) == len(paths) == 8


def test_other_flags_are_other_libraries(sources):
    (sources / "answer.cpp").write_text('extern "C" int answer() { return ARCH + EXTRA; }\n')
    assert build.load("-DARCH=1", extra=["-DEXTRA=1"]).answer() == 2
    assert build.load("-DARCH=1", extra=["-DEXTRA=2"]).answer() == 3
    log = build.library_path("-DARCH=1", extra=["-DEXTRA=2"]).with_name("build.log").read_text()
    assert "-DEXTRA=2" in log and "native" not in log


def test_the_compiler_may_have_arguments(sources, monkeypatch):
    (sources / "number.h").write_text("")
    monkeypatch.setenv("CXX", "g++ -DNUMBER='3 + 4'")
    assert build.load().answer() == 7


def no_locks(*_):
    raise OSError(37, "No locks available")


REASONS = {
    "no compiler": (
        lambda patch: (patch.setenv("CXX", ""), patch.setenv("PATH", "/nowhere")),
        r"none of g\+\+, clang\+\+, c\+\+ is on PATH, and CXX is not set\. Install one .*apt-get install g\+\+",
    ),
    "no such CXX": (lambda patch: patch.setenv("CXX", "no-such -O3"), "'no-such -O3', which is no program.*unset it"),
    "CXX with an open quote": (lambda patch: patch.setenv("CXX", "'g++"), "is no program here.*unset it"),
    "CXX fails in silence": (lambda patch: patch.setenv("CXX", "false"), "status 1: no output.*another compiler"),
    "a folder below a file": (
        lambda patch: patch.setenv("TORCH_EXTENSIONS_DIR", f"{__file__}/below"),
        r"below.* cannot be written or locked \(Not a directory\)\. Set TORCH_EXTENSIONS_DIR to another",
    ),
    "a file system without locks": (
        lambda patch: patch.setattr(build.fcntl, "flock", no_locks),
        r"locked \(No locks available\)\. Set TORCH_EXTENSIONS_DIR",
    ),
    "Windows": (lambda patch: patch.setattr(build, "fcntl", None), r"Windows has not\. Use Linux, WSL or macOS"),
    "no sources": (lambda patch: patch.setattr(build, "SOURCES", Path("/nowhere")), r"no C\+\+ sources.*Install the"),
}


@pytest.mark.parametrize(("change", "expected"), REASONS.values(), ids=REASONS.keys())
def test_the_reason_says_what_to_do(monkeypatch, change, expected):
    with monkeypatch.context() as patch:
        change(patch)
        text = reason()
    assert re.search(expected, text)


def test_a_cxx_that_cannot_run(calls):
    Path(os.environ["CXX"]).write_bytes(b"\x00")
    assert "cannot be run (Exec format error). Set CXX" in reason()


def test_a_failing_compile_quotes_the_first_error_and_names_the_log(sources, capfd):
    (sources / "answer.cpp").write_text("int unused(int x) { int y; }\n#error no luck\n#error and worse\n")
    text = reason()
    assert "no luck" in text and "worse" not in text and "unused" not in text
    log = Path(re.search(r"All it said is in (\S+)\. Mend", text)[1])
    assert "and worse" in log.read_text()
    assert files() == ["build.log", "lock"]
    assert re.fullmatch(BUILDING + r"failed after \d+\.\d s\n", capfd.readouterr().err)


def test_a_failing_link_quotes_the_linker():
    assert re.search("failed with exit status 1: .*not_there", reason(extra=["-lnot_there"]))


def test_a_failure_is_remembered_until_forced(sources, calls):
    (sources / "number.h").write_text("#error no luck\n")
    assert reason() == reason()
    assert len(calls()) == 1
    assert "no luck" in reason(force=True)
    assert len(calls()) == 2


def test_a_library_that_cannot_be_loaded_is_not_published(sources):
    (sources / "answer.cpp").write_text('int gone(); extern "C" int answer() { return gone(); }\n')
    assert re.search("cannot be loaded .*gone", reason())
    assert files() == ["build.log", "lock"]


def test_a_damaged_library_is_named_and_built_anew_by_force():
    build.library_path().parent.mkdir(parents=True)
    build.library_path().write_bytes(b"half")
    assert re.search(r"cannot be loaded .*Build it anew: python -m sparge_kernels\.cpu\.build --force", reason())
    assert build.load(force=True).answer() == 42


def test_a_refused_library_is_not_published(monkeypatch, capfd):
    def refuse(library):
        assert not build.library_path().exists()
        return f"it says {library.answer()}"

    assert "fails its check: it says 42. Set CXX" in reason(accept=refuse)
    assert files() == ["build.log", "lock"]
    assert "failed after" in capfd.readouterr().err
    forget(monkeypatch)
    assert build.load(accept=lambda library: None).answer() == 42


def test_an_error_in_the_check_is_no_reason_and_blocks_nothing(capfd):
    with pytest.raises(ZeroDivisionError):
        build.load(accept=lambda library: 1 // 0)
    assert "failed after" in capfd.readouterr().err
    assert build.load().answer() == 42


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are ELF files on Linux")
@pytest.mark.parametrize("share", [0, 0.001, 0.004, 0.1, 0.5], ids="{:.1%} left".format)
def test_a_library_that_is_cut_off_is_built_anew(share, calls, monkeypatch, capfd):
    """The loader would map it, and the process die of SIGBUS."""
    build.load()
    content = build.library_path().read_bytes()
    build.library_path().unlink()  # not truncated: this process has it mapped
    build.library_path().write_bytes(content[: int(share * len(content))])
    forget(monkeypatch)
    assert build.load().answer() == 42 and len(calls()) == 2
    assert f"{build.library_path()} is cut off" in capfd.readouterr().err
    assert build.library_path().read_bytes() == content
