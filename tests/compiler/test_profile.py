"""A profile says what it is for, refuses what it is not for, and can be read, merged and drawn."""

import builtins
import dataclasses
import json
import warnings

import pytest
import torch
from light import EXACT_FIELDS, LightBackend, Stack, run
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import sparge_compile as sparge
from sparge_compile import Policy, Profile, ProfileError
from sparge_compile.profile import Measurement, Origin
from sparge_compile.profile_model import device_name, model_facts
from sparge_kernels.cpu import KERNEL_VARIABLE
from sparge_kernels.thresholds import Thresholds

X = torch.randn(1, 6, 16)
KEEP_ALL = Thresholds(1.0, 1.0, 1.0, -1e30)


@pytest.fixture(autouse=True)
def kernel_of_both_predictors(monkeypatch):
    monkeypatch.setenv(KERNEL_VARIABLE, "blocked")


def entry(cdf=0.9, similarity=0.5, topk=None, pv=None):
    return Thresholds(topk, cdf, similarity, pv)


def profile_for(module=None, sites=None, **origin):
    facts = Origin(model=None if module is None else model_facts(module), **origin)
    return Profile({"blocks.0": (entry(),)} if sites is None else sites, origin=facts)


def full_profile():
    return Profile(
        {"blocks.0": (entry(), entry(0.97)), "blocks.10": (entry(topk=0.25, pv=-5.5),)},
        measured={"blocks.0": (Measurement(0.01, 0.999, 0.25), Measurement(0.04, 0.96, 0.5))},
        dense={"blocks.1": "its outputs are NaN"},
        not_calibrated={"text": "6 queries"},
        origin=Origin(model_facts(Stack(1)), "cpu AVX512", "0.1.0", "2.13.0", 0.05, 0.95),
    )


def test_everything_survives_a_round_trip(tmp_path):
    full_profile().save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded == full_profile() and hash(loaded) == hash(full_profile())
    assert loaded.thresholds_of("blocks.0") == (entry(), entry(0.97)) and loaded.thresholds_of("x") is None
    assert loaded.dense_reason("blocks.1") == "its outputs are NaN" and loaded.dense_reason("blocks.0") is None


def test_the_file_has_a_line_per_head_and_sorted_sites(tmp_path):
    def saved(profile, name):
        profile.save(tmp_path / name)
        return (tmp_path / name).read_text().splitlines()

    before = full_profile()
    after = dataclasses.replace(before, sites={**before.sites, "blocks.0": (entry(), entry(0.98))})
    after = dataclasses.replace(after, sites=dict(reversed(after.sites.items())))
    changed = [line for line in saved(after, "after") if line not in saved(before, "before")]
    assert len(changed) == 1 and '"cdf_threshold": 0.98' in changed[0]


def test_version_1_is_refused_and_says_what_to_do(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format_version": 1, "q_tile": 128, "k_tile": 64, "sites": {}}))
    with pytest.raises(ProfileError, match=r"format_version is 1.*this release reads 2.*Calibrate again"):
        Profile.load(path)


WRONG = {
    "predictor": ("predictor", "oracle", "must be one of clusters, sparge"),
    "no-predictor": ("predictor", None, "must be one of"),
    "dense": ("dense", {"a": 3}, "'dense', site 'a'"),
    "not-calibrated": ("not_calibrated", [], "'not_calibrated' must be an object"),
    "model": ("model", "Stack", "'model' must be null or an object"),
    "device": ("device", 3, "device=3"),
    "max-error": ("max_error", "low", "max_error='low'"),
    "dense-twice": ("dense", {"blocks.0": "why"}, "'blocks.0' has thresholds and is dense"),
}


@pytest.mark.parametrize(("key", "value", "message"), WRONG.values(), ids=WRONG)
def test_a_malformed_fact_is_refused(tmp_path, key, value, message):
    path = tmp_path / "profile.json"
    full_profile().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ProfileError, match=message) as error:
        Profile.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": -1}, r"error=-1 must be a finite number in \[0, inf\]"),
        ({"density": 2}, "density=2"),
        ({"extra": 1}, "exactly"),
    ],
    ids=["error", "density", "extra"],
)
def test_a_malformed_measurement_is_refused(tmp_path, change, message):
    path = tmp_path / "profile.json"
    full_profile().save(path)
    content = json.loads(path.read_text())
    content["sites"]["blocks.0"][1].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=r"site 'blocks.0', head 1.*" + message):
        Profile.load(path)
    for head in content["sites"]["blocks.0"][1:]:
        for measured in ("error", "worst_row", "density", "extra"):
            head.pop(measured, None)
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match="at every head or at none"):
        Profile.load(path)


def test_measurements_must_be_one_per_entry():
    with pytest.raises(ProfileError, match="1 measurements for 2 entries"):
        Profile({"a": (entry(), entry())}, measured={"a": (Measurement(0, 1, 1),)})
    with pytest.raises(ProfileError, match="predictor='oracle'"):
        Profile(predictor="oracle")


MALFORMED = {
    "empty": ({"sites": {"a": ()}}, "sites, site 'a': .* must hold one Thresholds"),
    "bare": ({"sites": {"a": entry()}}, "sites, site 'a': .* in a tuple"),
    "numbers": ({"sites": {"a": (0.5,)}}, "must hold one Thresholds, or one for each query head"),
    "no-mapping": ({"sites": [entry()]}, "sites=.*must be a mapping by site name"),
    "measured": ({"sites": {"a": (entry(),)}, "measured": {"a": ((0, 1, 1),)}}, "must hold one Measurement"),
    "reason": ({"dense": {"a": None}}, "dense, site 'a': None must be a text"),
    "q-tile": ({"q_tile": 64}, "made for tiles of 64 x 64 tokens; the kernels use 128 x 64"),
    "k-tile": ({"k_tile": 128}, "made for tiles of 128 x 128 tokens"),
}


@pytest.mark.parametrize(("fields", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_profile_is_refused_where_it_is_made(fields, message):
    with pytest.raises(ProfileError, match=message):
        Profile(**fields)


def test_a_profile_does_not_change_with_what_it_was_made_from():
    sites, dense = {"a": [entry()]}, {"b": "NaN"}
    profile = Profile(sites, dense=dense)
    digest = profile.digest
    sites["a"].append(entry())
    sites["c"], dense["d"] = (entry(),), "why"
    assert profile.digest == digest and profile == Profile({"a": (entry(),)}, dense={"b": "NaN"})


def test_equal_profiles_have_one_digest():
    ints = Profile(
        {"a": (Thresholds(1, 1, 0, -7),)}, measured={"a": (Measurement(0, 1, 1),)}, origin=Origin(max_error=1)
    )
    floats = Profile(
        {"a": (Thresholds(1.0, 1.0, -0.0, -7.0),)},
        measured={"a": (Measurement(0.0, 1.0, 1.0),)},
        origin=Origin(max_error=1.0),
    )
    assert ints == floats and ints.digest == floats.digest and hash(ints) == hash(floats)


STRICT = {
    "unknown": (lambda text: text.replace('"predictor"', '"author": 1, "predictor"'), "unknown key 'author'"),
    "in-model": (lambda text: text.replace('{"name"', '{"by": "me", "name"'), "'model' must be null or an object"),
    "twice": (lambda text: text.replace('"q_tile"', '"q_tile": 128, "q_tile"'), "key 'q_tile' stands twice"),
    "site-twice": (lambda text: text.replace('"blocks.10"', '"blocks.0"'), r"key 'blocks\.0' stands twice"),
    "nan": (lambda text: text.replace("0.999", "NaN"), "NaN is no number"),
    "infinity": (lambda text: text.replace("-5.5", "-Infinity"), "-Infinity is no number"),
    "overflow": (lambda text: text.replace('"error": 0.01', '"error": 1e999'), "error=inf must be a finite number"),
}


@pytest.mark.parametrize(("change", "message"), STRICT.values(), ids=STRICT)
def test_what_a_profile_file_may_not_hold_is_refused(tmp_path, change, message):
    path = tmp_path / "profile.json"
    full_profile().save(path)
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(ProfileError, match=message) as error:
        Profile.load(path)
    assert str(path) in str(error.value)


def test_the_model_it_was_made_for_is_accepted_however_it_is_compiled():
    model = Stack(2)
    profile = profile_for(model)
    profile.check_model(Stack(2))
    profile.check_model(model.to(torch.bfloat16))
    profile.check_model(torch.compile(model))
    inner = Stack(2)
    inner.blocks[0] = torch.compile(inner.blocks[0])
    profile.check_model(inner)


def test_a_model_is_seen_as_it_is_now():
    model = Stack(2)
    profile = profile_for(model)
    profile.check_model(model)
    model.blocks[0] = Stack(1)
    with pytest.raises(ProfileError, match="other names or shapes"):
        profile.check_model(model)


def test_the_wrappers_of_data_parallelism_are_seen_through():
    model = Stack(2)
    profile = profile_for(model)
    profile.check_model(nn.DataParallel(torch.compile(model)))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        profile.check_model(torch.compile(nn.parallel.DistributedDataParallel(model)))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ProfileError, match=r"the model is .*Linear"):
        profile.check_model(nn.DataParallel(nn.Linear(2, 2)))


def test_another_model_is_refused():
    profile = profile_for(Stack(2))
    with pytest.raises(ProfileError, match=r"made for light\.Stack, the model is .*Linear"):
        profile.check_model(nn.Linear(2, 2))
    with pytest.raises(ProfileError, match="other names or shapes"):
        profile.check_model(Stack(3))
    profile_for().check_model(nn.Linear(2, 2))


def test_a_class_of_the_running_script_is_known_by_its_name():
    model = Stack(1)
    facts = dataclasses.replace(model_facts(model), name="__main__.Stack")
    Profile(origin=Origin(facts)).check_model(model)
    with pytest.raises(ProfileError, match=r"made for __main__\.Other"):
        Profile(origin=Origin(dataclasses.replace(facts, name="__main__.Other"))).check_model(model)


def test_another_device_is_warned_of_once():
    profile = profile_for(device="NVIDIA H300, NVIDIA H400")
    with pytest.warns(UserWarning, match="calibrated on NVIDIA H300"):
        profile.check_model(Stack(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.check_model(Stack(1))
        profile_for(device="NVIDIA H300, " + device_name(torch.device("cpu"))).check_model(Stack(1))


def test_explain_warns_of_another_device_too():
    profile = profile_for(sites={}, device="NVIDIA H500")
    with pytest.warns(UserWarning, match="calibrated on NVIDIA H500"):
        sparge.explain(Stack(1), X, policy=Policy(profile=profile))


def test_a_compile_of_another_model_is_refused():
    policy = Policy(**{**EXACT_FIELDS, "profile": profile_for(Stack(2))})
    assert all(run(Stack(2), X, policy=policy)[1].rewritten)
    with pytest.raises(BackendCompilerFailed, match=r"ProfileError.*other names or shapes"):
        run(Stack(1), X, policy=policy)
    with pytest.raises(ProfileError, match="other names or shapes"):
        sparge.explain(Stack(1), X, policy=policy)
    assert not any(run(Stack(1), X, policy=Policy(profile=policy.profile, enabled=False))[1].rewritten)


def compiled(model, policy):
    """Runs it compiled, with its warnings heard."""
    with torch.no_grad(), sparge.rewriting(policy):
        return torch.compile(model, backend=LightBackend(policy))(X)


def test_sites_the_compiled_model_does_not_have_are_warned_of_once():
    sites = dict.fromkeys(("blocks.0", "blocks.7", "Stack", "other:2"), (KEEP_ALL,))
    policy = Policy(**{**EXACT_FIELDS, "profile": Profile(sites, dense={"gone": "NaN"})})
    with pytest.warns(
        UserWarning, match=r"Stack has no module for 3 of the sites in its profile: blocks\.7, other:2, gone\."
    ):
        compiled(Stack(1), policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Stack(1), policy)
        named = Profile({"blocks.0:1": (KEEP_ALL,), "blocks.1": (KEEP_ALL,)})
        compiled(Stack(2), Policy(**{**EXACT_FIELDS, "profile": named}))


def test_explain_warns_of_missing_sites_where_it_is_heard():
    profile = Profile({"blocks.0": (KEEP_ALL,), "blocks.8": (KEEP_ALL,)})
    with pytest.warns(UserWarning, match=r"no module for 1 of the sites in its profile: blocks\.8"):
        sparge.explain(Stack(1), X, policy=Policy(profile=profile))


def test_a_site_dense_in_the_profile_stays_dense_and_says_why_even_under_strict():
    profile = Profile({"blocks.0": (KEEP_ALL,)}, dense={"blocks.1": "its outputs are NaN"})
    _, backend = run(Stack(2), X, policy=Policy(min_tokens=0, profile=profile, strict=True))
    assert backend.rewritten == [True, False]
    assert backend.sites[1].reason == "the profile keeps it dense (its outputs are NaN)" and backend.sites[1].requested


def test_a_merge_takes_the_more_careful_of_two():
    one = Profile(
        {"a": (entry(0.9, 0.8), entry(topk=0.2)), "b": (entry(),)},
        measured={"a": (Measurement(0.01, 0.99, 0.5), Measurement(0.04, 0.97, 0.2))},
        not_calibrated={"c": "short", "d": "short"},
        origin=Origin(device="cpu AVX512", max_error=0.05, min_row_cosine=0.95),
    )
    other = Profile(
        {"a": (entry(0.95, 0.3, pv=-100.0), entry(topk=0.3)), "c": (entry(0.5),)},
        measured={"a": (Measurement(0.02, 0.98, 0.4), Measurement(0.03, 0.96, 0.3))},
        dense={"b": "NaN"},
        origin=Origin(device="NVIDIA H200", max_error=0.1, min_row_cosine=0.9),
    )
    merged = one.merge(other)
    assert merged.sites == {"a": (entry(0.95, 0.8, pv=-100.0), entry(topk=0.3)), "c": (entry(0.5),)}
    assert merged.measured["a"] == (Measurement(0.02, 0.98, 0.5), Measurement(0.04, 0.96, 0.3))
    assert merged.dense == {"b": "NaN"} and merged.not_calibrated == {"d": "short"}
    assert merged.origin.device == "NVIDIA H200, cpu AVX512"
    assert (merged.origin.max_error, merged.origin.min_row_cosine) == (0.1, 0.9)
    assert one.merge() == one and other.merge(one).sites == merged.sites and one.merge(one).sites == one.sites


def test_a_merge_compares_topk_and_cdf_by_what_was_measured():
    sparse, full = entry(topk=0.2), entry(topk=1.0)
    of = {"a": (Measurement(0.01, 0.99, 0.3),)}
    denser = Profile({"a": (sparse,)}, measured={"a": (Measurement(0.01, 0.99, 0.4),)})
    assert Profile({"a": (entry(),)}, measured=of).merge(denser).sites["a"] == (sparse,)
    assert Profile({"a": (entry(),)}).merge(Profile({"a": (full,)})).sites["a"] == (full,)
    with pytest.raises(ProfileError, match="nothing says which keeps more"):
        Profile({"a": (entry(),)}).merge(Profile({"a": (sparse,)}))


def test_a_merge_gives_each_head_the_entry_for_all_of_them():
    merged = Profile({"a": (entry(0.9), entry(0.99))}).merge(Profile({"a": (entry(0.95),)}))
    assert merged.sites["a"] == (entry(0.95), entry(0.99))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: profile_for(Stack(3)), "different models"),
        (lambda: Profile(predictor="sparge"), "predictor 'clusters' and 'sparge'"),
        (lambda: Profile({"blocks.0": (entry(), entry(), entry())}), "2 heads in one profile and 3"),
    ],
    ids=["model", "predictor", "heads"],
)
def test_a_merge_of_what_does_not_fit_is_refused(other, message):
    with pytest.raises(ProfileError, match=message):
        profile_for(Stack(2), {"blocks.0": (entry(), entry())}).merge(other())


def test_the_table_shows_every_site_in_100_columns():
    long = "a.very.long.name." * 8 + "attention"
    sites = {**full_profile().sites, long: (entry(), entry(topk=0.5))}
    profile = dataclasses.replace(full_profile(), sites=sites, not_calibrated={"text": "why " * 60})
    table = str(profile)
    assert all(len(line) <= 100 for line in table.splitlines())
    for word in ("3 sites", "Stack", "0.375", "(0.25..0.50)", "0.0400", "0.9600", "cdf 0.9..0.97", "topk 0.25"):
        assert word in table, word
    assert "blocks.1: dense, its outputs are NaN" in table and "text: not calibrated, why" in table
    assert (
        table.index("blocks.0 ") < table.index("blocks.10 ")
        and "name.attention" in table
        and str(Profile()).startswith("Profile: 0 sites")
    )


def test_the_figure_is_drawn_and_saved(tmp_path):
    pytest.importorskip("matplotlib")
    figure = full_profile().plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 0
    assert [axes.get_title() for axes in figure.axes][:2] == ["density", "error (relative L1)"]
    with pytest.raises(ValueError, match="no measurements"):
        Profile().plot()


def test_without_matplotlib_the_figure_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"sparge-compile\[plot\]"):
        full_profile().plot()
