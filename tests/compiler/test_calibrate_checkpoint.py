"""A calibration that stops goes on from its checkpoint, and from no other."""

import json

import pytest
import torch
from calibrated import QUIET
from light import Stack

import sparge_compile as sparge
from sparge_compile import fingerprint


class Interrupts(list):
    """Batches, and Ctrl-C after so many of them."""

    def __init__(self, batches, after):
        super().__init__(batches)
        self.after = after

    def __iter__(self):
        for batch in super().__iter__():
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
            yield batch


@pytest.mark.parametrize("after", [1, 4], ids=["first-pass", "second-pass"])
def test_an_interrupted_calibration_goes_on_from_its_checkpoint(tmp_path, monkeypatch, after):
    model, batches = Stack(2).eval(), [torch.randn(1, 200, 16) for _ in range(3)]
    path = tmp_path / "checkpoint.json"
    whole = sparge.calibrate(model, batches, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        sparge.calibrate(model, Interrupts(batches, after), checkpoint=path, **QUIET)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.json"]
    assert json.loads(path.read_text())["finished"] == after
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    assert sparge.calibrate(model, batches, checkpoint=path, **QUIET) == whole
    assert len(runs) == 6 - after and not path.exists()


@pytest.mark.parametrize("change", ["model", "bound", "count"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change):
    model, batches = Stack(1).eval(), [torch.randn(1, 200, 16) for _ in range(2)]
    path = tmp_path / "checkpoint.json"
    with pytest.raises(KeyboardInterrupt):
        sparge.calibrate(model, Interrupts(batches, 1), checkpoint=path, **QUIET)
    options = {**QUIET, "checkpoint": path}
    with pytest.raises(ValueError, match="of another model, number of inputs, policy, bound or version"):
        if change == "model":
            sparge.calibrate(Stack(2).eval(), batches, **options)
        elif change == "bound":
            sparge.calibrate(model, batches, max_error=0.06, **options)
        else:
            sparge.calibrate(model, batches[:1], **options)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not one of calibrate"):
        sparge.calibrate(model, batches, **options)


def interrupted(model, batches, path, after=1):
    with pytest.raises(KeyboardInterrupt):
        sparge.calibrate(model, Interrupts(batches, after), checkpoint=path, **QUIET)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    model, batches = Stack(1).eval(), [torch.randn(1, 200, 16) for _ in range(2)]
    path = tmp_path / "checkpoint.json"
    interrupted(model, batches, path)
    with pytest.raises(ValueError, match=r"checkpoint\.json' was begun with other weights"):
        sparge.calibrate(Stack(1).eval(), batches, checkpoint=path, **QUIET)
    with torch.no_grad():
        model.blocks[0].qkv.weight[-1, -1] += 1
    with pytest.raises(ValueError, match="other weights"):
        sparge.calibrate(model, batches, checkpoint=path, **QUIET)


def test_a_checkpoint_of_other_inputs_is_refused_and_only_finished_ones_count(tmp_path):
    model, batches = Stack(1).eval(), [torch.randn(1, 200, 16) for _ in range(2)]
    path = tmp_path / "checkpoint.json"
    interrupted(model, batches, path)
    other = [batches[0].clone(), batches[1]]
    other[0][0, 100, 3] += 1e-3
    with pytest.raises(ValueError, match="begun with other inputs: number 1 of 2 differs"):
        sparge.calibrate(model, other, checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="begun with other inputs"):
        sparge.calibrate(model, batches[::-1], checkpoint=path, **QUIET)
    assert sparge.calibrate(model, [batches[0].clone(), batches[1]], checkpoint=path, **QUIET).sites


def test_equal_batches_have_one_fingerprint_and_others_another():
    class Plain:
        pass

    x = torch.arange(12.0).view(3, 4)
    assert fingerprint.of_batch({"x": x, "o": Plain()}) == fingerprint.of_batch({"x": x.clone(), "o": Plain()})
    assert fingerprint.of_batch(x.T) == fingerprint.of_batch(x.T.contiguous())
    batches = [x, x.double(), x.view(4, 3), x + 1, [x], [x, 1], [x, [1]], {"x": x}, {"y": x}, 1, "1", None, b"1"]
    batches += [
        torch.empty(0),
        torch.empty(0, 2),
        torch.tensor(True),
        torch.tensor(1j),
        x.bfloat16(),
        (x, x),
        ((x,), x),
    ]
    batches.append(x.to_sparse())
    assert len({fingerprint.of_batch(batch) for batch in batches}) == len(batches)


DAMAGES = {
    "finished": lambda content: content.pop("finished"),
    "too-many": lambda content: content.update(finished=5),
    "text": lambda content: content.update(finished="1"),
    "no-inputs": lambda content: content.update(inputs=[]),
    "sites": lambda content: content.update(sites=[]),
    "sums": lambda content: content["sites"].pop("sums"),
    "sum": lambda content: content["sites"]["sums"]["blocks.0"].update(error=[[1.0]]),
    "dense": lambda content: content["sites"].update(dense=3),
    "verified": lambda content: content["sites"].update(verified={"blocks.0": {"ladders": [[99]]}}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_says_to_delete_it(tmp_path, damage):
    model, batches = Stack(1).eval(), [torch.randn(1, 200, 16) for _ in range(2)]
    path = tmp_path / "checkpoint.json"
    interrupted(model, batches, path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"checkpoint\.json' is damaged .*Delete it to begin anew"):
        sparge.calibrate(model, batches, checkpoint=path, **QUIET)


def test_a_checkpoint_that_cannot_be_written_is_noticed_before_the_first_input(tmp_path):
    runs = []
    model = Stack(1).eval()
    model.register_forward_hook(lambda *_: runs.append(1))
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "checkpoint.json", tmp_path / "file" / "checkpoint.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path}' cannot be written"):
            sparge.calibrate(model, [torch.randn(1, 200, 16)], checkpoint=path, **QUIET)
    assert not runs
