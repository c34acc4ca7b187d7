"""The doctor on a sound machine, and what each of its looks makes of what it may find."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

import pytest
import torch

from sparge_compile.command import building, doctor, hardware, kernels, self_test, software, speed
from sparge_compile.command.findings import Diagnosis, Section, examine, from_reason, note, problem
from sparge_kernels import ops


@pytest.fixture
def quick(monkeypatch):
    """Fewer cases, and a speed line that takes no time."""
    few = tuple(case for case in self_test.CASES if case.name in ("plain", "bool mask"))
    monkeypatch.setattr(self_test, "CASES", few)
    monkeypatch.setattr(speed, "TOKENS", 256)


def only(findings):
    (one,) = findings
    return one


@pytest.mark.skipif(ops.unavailable(torch.device("cpu")) is not None, reason="this machine is not sound")
def test_a_sound_machine_is_status_0_and_all_of_it_is_said(quick, capsys):
    assert doctor.run(as_json=True) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"version", "ok", "sections", "problems", "exit_code"}
    assert content["ok"] and content["problems"] == [] and content["exit_code"] == 0
    titles = [section["title"] for section in content["sections"]]
    assert titles == list(doctor.SECTIONS)
    found = {one["name"]: one for section in content["sections"] for one in section["findings"]}
    assert torch.__version__ in found["torch"]["value"]
    for kernel, cases in {"reference": 2, "native": 2, "blocked": 1}.items():
        assert found[f"{kernel} on cpu"]["value"].startswith(f"right in {cases} cases")
    assert found["torch.compile on cpu"]["value"].startswith("right in 2 cases")
    assert "times as fast as the fastest dense peer" in found["speed on cpu"]["value"]
    assert all(set(one) == {"name", "value", "level", "advice"} for one in found.values())


@pytest.mark.parametrize("colour", [None, "1"], ids=["plain", "FORCE_COLOR"])
def test_piped_text_is_unfolded_and_ends_with_what_to_do(monkeypatch, capsys, colour):
    path = "/a/long/path" * 20
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if colour:
        monkeypatch.setenv("FORCE_COLOR", colour)

    def look():
        yield problem("one", f"a long story at {path}", "do this")
        yield note("two", "is odd", "do that")

    monkeypatch.setattr(doctor, "SECTIONS", {"Things": look})
    assert doctor.run(as_json=False) == 1
    shown = capsys.readouterr().out
    assert ("\x1b" in shown) == bool(colour)
    shown = re.sub(r"\(\d+ s\)", "(0 s)", re.sub(r"\x1b\[[\d;]*m", "", shown))
    assert shown.splitlines() == [
        "Things",
        f"X  {'one':<22} a long story at {path}",
        f"!  {'two':<22} is odd -> do that",
        "",
        f"one: a long story at {path} -> do this",
        "1 problem (0 s).",
    ]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "JSON"])
def test_text_is_said_section_by_section_and_json_at_the_end(monkeypatch, capsys, as_json):
    """What a section examines may kill the process."""
    said = []

    def second():
        said.append(capsys.readouterr().out)
        yield note("b", "is there")

    monkeypatch.setattr(doctor, "SECTIONS", {"First": lambda: [note("a", "is here")], "Second": second})
    assert doctor.run(as_json=as_json) == 0
    assert said == ["" if as_json else f"First\n!  {'a':<22} is here\n"]


def test_a_look_that_fails_keeps_what_it_found_and_is_a_problem():
    def look():
        yield note("first", "is here")
        raise RuntimeError("the disk\nis gone")

    section = examine("Things", look)
    assert [one.level for one in section.findings] == ["note", "problem"]
    assert "RuntimeError: the disk is gone" in section.findings[1].value


def test_what_several_looks_find_is_one_problem():
    sections = tuple(Section(name, [from_reason(name, "No compiler. Install one.")]) for name in "ab")
    diagnosis = Diagnosis(sections)
    assert [(one.name, one.value, one.advice) for one in diagnosis.problems] == [("a", "No compiler", "Install one.")]
    assert diagnosis.code == 1


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.10.1", "problem"), ("2.11.0+cpu", "ok"), ("2.15.3", "ok"), ("2.16.0.dev1+cu130", "note")],
)
def test_the_versions_of_torch(version, level):
    assert software.torch_version(version).level == level


@pytest.mark.parametrize(("has_gpu", "level"), [(False, "ok"), (True, "problem")], ids=["no GPU", "GPU"])
def test_triton_is_missed_on_a_gpu_only(monkeypatch, has_gpu, level):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert software.triton_version().level == level


def test_a_backend_that_is_not_registered_is_a_problem(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert "there is no entry point" in only(software.registration()).value
    other = importlib.metadata.EntryPoint("sparge", "other:backend", software.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (other,))
    assert only(software.registration()).level == "problem"


def test_another_copy_of_the_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    assert software.own_version().level == "problem"


def test_variables_that_switch_things_off_or_slow_them_are_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("TRITON_INTERPRET", "SPARGE_CPU_KERNEL", *software.SHOWN):
        monkeypatch.delenv(name, raising=False)
    assert list(software.environment()) == []
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SPARGE_CPU_KERNEL", "blocked")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = {one.name: one.level for one in software.environment()}
    expected = {"TORCHDYNAMO_DISABLE": "problem", "TRITON_INTERPRET": "note", "SPARGE_CPU_KERNEL": "note"}
    assert found == {**expected, "OMP_NUM_THREADS": "ok"}


def test_slow_and_unmeasured_instruction_sets_are_said():
    levels = lambda features: [one.level for one in hardware.processor(features)][1:]  # noqa: E731
    assert levels(["avx512_vnni"]) == ["ok"]
    assert levels(["avx2"]) == ["note"]
    assert levels(["avx512_vnni", "amx_tile"]) == ["ok", "note"]
    slow = list(hardware.processor(["avx2"]))[-1].value
    assert slow.endswith("without avx512_vnni a call gains mostly by the tiles it skips")
    for features in (["sse4_2"], ["avx2", "avx512f"]):
        assert "nothing was measured" in list(hardware.processor(features))[-1].value


def test_more_threads_than_cpus_are_said(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    monkeypatch.setattr(hardware, "QUOTA", quota)
    assert hardware.usable_cpus() == 0.5
    quota.write_text("max 100000\n")
    assert hardware.usable_cpus() >= 1
    assert only(hardware.threads(2, 2.0)).level == "ok"
    assert only(hardware.threads(8, 2.5)).advice == "set OMP_NUM_THREADS=2"


def test_two_openmp_runtimes_are_said(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text("7f r-xp 00 00:00 1 /a/libgomp.so.1\n7f r--p 00 00:00 1 /a/libgomp.so.1\n")
    monkeypatch.setattr(hardware, "MAPS", maps)
    assert only(hardware.openmp()).value == "/a/libgomp.so.1"
    maps.write_text(maps.read_text() + "7f r-xp 00 00:00 1 /b/torch.libs/libgomp-a34b.so.1\n7f 1 /c/libiomp5.so\n")
    assert "3 runtimes" in only(hardware.openmp()).value
    maps.write_text("7f r-xp 00 00:00 1 /a/libstomp.so\n")
    assert only(hardware.openmp()).value == "no runtime is loaded"


@pytest.mark.parametrize(
    ("tool", "built_for", "level"),
    [(None, "13.0", "ok"), ("/bin/nvidia-smi", None, "note"), ("/bin/nvidia-smi", "13.0", "problem")],
    ids=["no GPU", "CPU build", "driver"],
)
def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch, tool, built_for, level):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only(hardware.gpus()).level == level


def test_every_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = {"GPU": "H200", "capability": "9.0", "memory": "141 GiB", "driver": "580"}
    monkeypatch.setattr(hardware.gpu_machine, "describe", lambda device: facts)
    assert [one.value for one in hardware.gpus()] == ["H200: capability 9.0, memory 141 GiB, driver 580"] * 2


def test_the_default_min_tokens_has_a_source(monkeypatch):
    monkeypatch.setattr(ops, "unmeasured", lambda *_: None)
    for products, tokens in (("AVX-512 VNNI", 1024), ("AVX2", 2048)):
        monkeypatch.setattr(ops, "int8_products", lambda _, it=products: it)
        found = only(kernels.minimum(kernels.CPU)).value
        assert found.startswith(
            f"{tokens} on cpu: the measured break-even of CPUs with {products}; 8192 with precision"
        )
    assert "an assumption" in only(kernels.minimum(torch.device("cuda", 0))).value
    monkeypatch.setattr(ops, "int8_products", lambda _: None)
    assert "it takes skipped tiles to gain" in only(kernels.minimum(kernels.CPU)).value
    monkeypatch.setattr(ops, "unmeasured", lambda device, dtype, _: "AMX" if dtype == torch.bfloat16 else None)
    assert [one.level for one in kernels.minimum(kernels.CPU)] == ["ok", "note"]


def test_folders_that_cannot_be_used_are_problems(monkeypatch, tmp_path):
    assert building.folder("x", tmp_path / "new", "X", "problem").level == "ok"
    (tmp_path / "file").write_text("")
    found = building.folder("x", tmp_path / "file" / "new", "X", "problem")
    assert found.level == "problem" and found.advice == "set X to a folder that can be written"
    monkeypatch.setattr(building, "LEAST_SPACE", 2**80)
    assert "of free space" in building.folder("x", tmp_path, "X", "problem").value

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(building.tempfile, "TemporaryFile", read_only)
    assert "Read-only file system" in building.folder("x", tmp_path, "X", "note").value


def test_only_the_native_kernel_is_timed_and_the_interpreter_tested_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert self_test.tested_kernels() == ["native", "blocked"]
    monkeypatch.setenv("SPARGE_CPU_KERNEL", "blocked")
    assert only(speed.look()).value == "not measured: the blocked kernel is not for speed"
    monkeypatch.setenv("SPARGE_CPU_KERNEL", "interpreted")
    assert self_test.tested_kernels() == ["native", "blocked", "interpreted"]
    assert not any(case.is_default or case.batch > 1 for case in self_test.cases_of("interpreted"))
