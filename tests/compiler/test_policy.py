"""Policies say what is wrong with them; options reach them; profiles are read whole or refused."""

import json
import math
import stat
import warnings

import pytest
import torch
from light import Attention

import sparge_compile as sparge
from sparge_compile import Policy, Profile, ProfileError
from sparge_compile.policy import replace, split_options
from sparge_kernels.thresholds import Thresholds

OUT_OF_RANGE = [
    ("topk", 0.0, "(0, 1]"),
    ("topk", -0.1, "(0, 1]"),
    ("topk", 1.5, "(0, 1]"),
    ("topk", math.nan, "(0, 1]"),
    ("topk", math.inf, "(0, 1]"),
    ("cdf_threshold", 0, "(0, 1]"),
    ("cdf_threshold", 1.0001, "(0, 1]"),
    ("similarity_threshold", -1.1, "[-1, 1]"),
    ("similarity_threshold", 1.1, "[-1, 1]"),
    ("similarity_threshold", math.nan, "[-1, 1]"),
    ("pv_threshold", 0.0, "(-inf, 0)"),
    ("pv_threshold", 3.0, "(-inf, 0)"),
    ("pv_threshold", -math.inf, "(-inf, 0)"),
    ("min_tokens", -1, "[0, inf)"),
    ("precision", "int4", "auto, int8, fp8, none"),
    ("precision", None, "auto, int8, fp8, none"),
    ("predictor", "means", "auto, clusters, sparge"),
]
WRONG_TYPE = [
    ("enabled", 1),
    ("enabled", "yes"),
    ("strict", None),
    ("topk", "0.3"),
    ("topk", True),
    ("cdf_threshold", "auto"),
    ("similarity_threshold", False),
    ("pv_threshold", "auto"),
    ("min_tokens", 128.0),
    ("min_tokens", True),
    ("dense", "blocks.0"),
    ("dense", 3),
    ("dense", (1, 2)),
    ("profile", 3),
    ("profile", {"sites": {}}),
]


@pytest.mark.parametrize(("field", "value", "allowed"), OUT_OF_RANGE, ids=lambda x: str(x))
def test_a_value_out_of_range_names_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError) as error:
        Policy(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(("field", "value"), WRONG_TYPE, ids=lambda x: repr(x))
def test_a_wrong_type_names_field_and_value(field, value):
    with pytest.raises(TypeError) as error:
        Policy(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(Policy(), {"cdf_treshold": 0.9}),
        lambda: sparge.rewriting(cdf_treshold=0.9),
        lambda: split_options({"sparge.cdf_treshold": 0.9}),
        lambda: sparge.attention(*[torch.zeros(1, 1, 2, 4)] * 3, cdf_treshold=0.9),
    ],
    ids=["replace", "rewriting", "options", "attention"],
)
def test_an_unknown_field_is_an_error_that_suggests_the_known_one(make):
    with pytest.raises((TypeError, ValueError), match=r"Did you mean 'cdf_threshold'\?.*min_tokens"):
        make()


def test_rewriting_checks_its_fields_when_constructed():
    with pytest.raises(ValueError, match=r"topk=2.*\(0, 1\]"):
        sparge.rewriting(topk=2)
    with pytest.raises(TypeError, match=r"takes a sparge_compile.Policy"):
        sparge.rewriting(0.3)


def test_options_are_split_into_policy_and_inductor():
    policy, rest = split_options({"sparge.topk": 0.25, "sparge.dense": ["a", "b"], "max_autotune": True})
    assert policy == Policy(topk=0.25, dense=("a", "b"))
    assert rest == {"max_autotune": True}


def compile_and_run(**compile_options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.compile(Attention(), backend="sparge", **compile_options)(torch.randn(1, 4, 16))


def test_options_reach_the_graph():
    compile_and_run(options={"sparge.min_tokens": 999})
    (site,) = sparge.last_report().sites
    assert not site.rewritten and "min_tokens is 999" in site.reason


@pytest.mark.parametrize(
    ("compile_options", "message"),
    [
        ({"options": {"sparge.tpok": 0.3}}, r"sparge\.tpok.*Did you mean 'topk'"),
        ({"options": {"sparge.topk": 7}}, r"topk=7.*\(0, 1\]"),
        ({"options": {"sparge.strict": "yes"}}, r"strict='yes'"),
        ({"options": {"topk": 0.3}}, "topk"),
        ({"options": {"spagre.topk": 0.3}}, r"spagre\.topk"),
        ({"mode": "fastest"}, "fastest"),
    ],
    ids=["unknown-field", "out-of-range", "wrong-type", "field-without-prefix", "misspelt-prefix", "unknown-mode"],
)
def test_a_bad_option_or_mode_is_an_error_through_torch_compile(compile_options, message):
    with pytest.raises(Exception, match=message):
        compile_and_run(**compile_options)


EQUAL = [
    (Policy(topk=1), Policy(topk=1.0)),
    (Policy(dense=["a"]), Policy(dense=("a",))),
    (Policy(similarity_threshold=0.0), Policy(similarity_threshold=-0.0)),
    (Policy(profile=Profile({"a": (Thresholds(None, 0.9, 0.5, None),)})),) * 2,
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=["int-float", "list-tuple", "minus-zero", "profile"])
def test_equal_policies_have_equal_tokens(one, other):
    assert one == other and hash(one) == hash(other)
    assert one.token == other.token and one.identity == other.identity


def test_policies_that_make_the_same_choices_share_a_token():
    assert Policy(predictor="auto").token == Policy(predictor="clusters").token != Policy(predictor="sparge").token
    assert Policy(precision="auto").token == Policy(precision="int8").token
    assert Policy(topk=0.3, cdf_threshold=0.5).token == Policy(topk=0.3, cdf_threshold=0.9).token


def test_different_policies_have_different_tokens_and_disabled_ones_share_one():
    changes = [{}, {"topk": 0.3}, {"cdf_threshold": 0.9}, {"similarity_threshold": 0.1}, {"pv_threshold": -3.0}]
    changes += [
        {"predictor": "sparge"},
        {"min_tokens": 0},
        {"dense": ("a",)},
        {"dense": ("a", "b")},
        {"precision": "none"},
        {"strict": True},
    ]
    changes += [{"profile": Profile({"a": (Thresholds(t, 0.9, 0.5, None),)})} for t in (0.1, 0.2)]
    assert len({Policy(**change).token for change in changes}) == len(changes)
    assert Policy(enabled=False, topk=0.3).token == Policy(enabled=False).token != Policy().token


ENTRY = {"topk": None, "cdf_threshold": 0.9, "similarity_threshold": 0.5, "pv_threshold": -4.0}
GOOD = {"format_version": 2, "q_tile": 128, "k_tile": 64, "predictor": "clusters", "sites": {"blocks.0": [ENTRY]}}
BAD_PROFILES = [
    ("{", "not valid JSON"),
    ("[]", "JSON object"),
    ({**GOOD, "format_version": 3}, "format_version is 3"),
    ({key: value for key, value in GOOD.items() if key != "format_version"}, "format_version"),
    ({**GOOD, "q_tile": 64}, "64 x 64"),
    ({**GOOD, "sites": []}, "sites"),
    ({**GOOD, "sites": {"blocks.0": []}}, "blocks.0"),
    ({**GOOD, "sites": {"blocks.0": [{**ENTRY, "topk": 1.5}]}}, r"blocks\.0.*head 0.*topk=1\.5.*\(0, 1\]"),
    ({**GOOD, "sites": {"blocks.0": [ENTRY, {**ENTRY, "pv_threshold": 1.0}]}}, r"head 1.*1\.0.*\(-inf, 0\)"),
    ({**GOOD, "sites": {"blocks.0": [{**ENTRY, "topk": "all"}]}}, "head 0"),
    ({**GOOD, "sites": {"blocks.0": [{**ENTRY, "topk": math.nan}]}}, "NaN is no number"),
    ({**GOOD, "sites": {"blocks.0": [{**ENTRY, "topk": True}]}}, "topk=True"),
    ({**GOOD, "sites": {"blocks.0": [{**ENTRY, "extra": 1}]}}, "exactly topk"),
]
BAD_IDS = ["corrupt", "not-an-object", "version", "no-version", "geometry", "sites", "no-heads"]
BAD_IDS += ["out-of-range", "second-head", "string", "nan", "boolean", "unknown-key"]


@pytest.mark.parametrize(("content", "message"), BAD_PROFILES, ids=BAD_IDS)
def test_a_bad_profile_is_refused_with_path_and_place(tmp_path, content, message):
    path = tmp_path / "profile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ProfileError, match=message) as error:
        Profile.load(path)
    assert str(path) in str(error.value)
    with pytest.raises(ProfileError):
        Policy(profile=path)


@pytest.mark.parametrize("make", [Profile.load, lambda path: Policy(profile=str(path))], ids=["load", "policy"])
def test_a_missing_profile_says_so(tmp_path, make):
    with pytest.raises(ProfileError, match=r"missing\.json' does not exist"):
        make(tmp_path / "missing.json")


def a_profile() -> Profile:
    per_head = (Thresholds(0.3, 0.9, -1.0, None), Thresholds(None, 1.0, 1.0, -5.5))
    return Profile({"blocks.0": per_head, "blocks.1": (Thresholds(None, 0.1 + 0.2, 0.5, None),)})


def test_a_profile_survives_a_round_trip(tmp_path):
    a_profile().save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded == a_profile() and loaded.digest == a_profile().digest
    assert Policy(profile=tmp_path / "profile.json").token == Policy(profile=a_profile()).token


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    path.write_text("before")

    def fail(self):
        raise OSError("disk full")

    monkeypatch.setattr(Profile, "_text", fail)
    with pytest.raises(OSError, match="disk full"):
        a_profile().save(path)
    assert path.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_saved_profile_can_be_read_by_whoever_may_read_the_folder(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    a_profile().save(tmp_path / "profile.json")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "profile.json")]
    assert modes[0] == modes[1]
