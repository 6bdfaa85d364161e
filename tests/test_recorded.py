"""A step on CUDA as one launch, as far as it can be proved without a GPU."""

import contextlib
import copy

import pytest
import torch

import models
import optim
import recorded
import train

PRECISION = train.Precision(None, False, torch.channels_last)


class NoStream:
    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def no_streams(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: NoStream())
        monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class Replayed(recorded.Recorded):
    """On a CPU a replay is the step once more, on the memory that was recorded."""

    replays = 0

    def record(self, x, labels):
        inputs, results = [torch.zeros_like(x), torch.zeros_like(labels)], torch.zeros(2).unbind()

        class Graph:
            def replay(graph):
                self.replays += 1
                for held, new in zip(results, self.step(*inputs, self.rate, self.share),
                                     strict=True):
                    held.copy_(new)

        self.shapes[x.shape] = Graph(), inputs, results


def small_training(wrap, steps=10, scaler=None, precision=PRECISION):
    """Weights, average and losses after steps on batches of two shapes; wrap: of the step."""
    torch.manual_seed(0)
    network = models.cnn(width=16)
    optimizer, average = optim.Muon(network, 0.03, 0.05), optim.Average(network)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    step = wrap(train.make_step(network, optimizer, scaler, average, precision, 0.1))
    losses = []
    for i in range(steps):
        side = (16, 24)[i % 2]
        x = torch.randn(8, 3, side, side)
        loss, right = step(x, torch.randint(10, (8,)), 0.01 * (i + 1), average.next_share())
        losses.append(loss)
        assert 0 <= right <= 8
    return network.state_dict(), average.module.state_dict(), losses, step


def written(step):
    """The step as it is written, its numbers as tensors: what is recorded on CUDA."""
    return lambda x, labels, rate, share: step(x, labels, torch.tensor(rate), torch.tensor(share))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_replayed_steps_are_the_steps_that_are_written():
    network, average, losses, _ = small_training(written)
    again, average_again, losses_again, step = small_training(
        lambda step: Replayed(step, torch.device("cpu")))
    assert step.replays == 4  # of ten, of two shapes, three each warm up
    assert same(again, network) and same(average_again, average)
    assert torch.equal(torch.stack(losses_again), torch.stack(losses))


def test_a_rate_that_is_a_tensor_gives_the_step_of_a_number():
    (a, *_), (b, *_) = (small_training(wrap, steps=1) for wrap in (written, lambda step: step))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_results_of_a_replay_are_kept_when_the_next_one_overwrites_them():
    _, _, losses, _ = small_training(lambda step: Replayed(step, torch.device("cpu")))
    assert len({float(loss) for loss in losses}) == len(losses)


def test_where_recording_fails_steps_run_as_they_are_written_and_say_so_once(monkeypatch):
    @contextlib.contextmanager
    def refuse(graph):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    with pytest.warns(UserWarning, match="not recorded.*operation not permitted$") as said:
        found = small_training(lambda step: recorded.Recorded(step, torch.device("cpu")))
    assert same(found[0], small_training(written)[0])
    assert len(said) <= 2  # one for each shape


def test_what_was_recorded_for_smaller_crops_is_dropped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    step = recorded.Recorded(lambda x, labels, rate, share: [x.sum()], torch.device("cpu"))
    for shape in ((8, 3, 16, 16), (6, 3, 16, 16), (8, 3, 24, 24), (6, 3, 24, 24)):
        step.record(torch.zeros(shape), torch.zeros(shape[0]))
    assert {*step.shapes} == {(8, 3, 24, 24), (6, 3, 24, 24)}


def test_a_step_asks_the_device_for_no_number(fake_device, monkeypatch):
    fake_device.watches = False
    network = models.cnn(width=16).to("cuda")

    def backward(loss):  # autograd's engine wants a real device
        for p in network.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    optimizer, average = optim.Muon(network, 0.03, 0.05), optim.Average(network)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = train.make_step(network, optimizer, scaler, average, PRECISION, 0.1)
    fake_device.watches = True
    x = torch.empty(8, 3, 16, 16, device="cuda")
    labels = torch.empty(8, dtype=torch.int64, device="cuda")
    rate, share = torch.empty(2, device="cuda").unbind()
    loss, right = step(x, labels, rate, share)
    assert loss.device.type == right.device.type == "cuda"


# ---------------------------------------------------------------- float16: the scale of the loss


def scaled_step(gradient_scale, poison=False):
    """A network and its weights before, after a step under a GradScaler."""
    torch.manual_seed(0)
    network = models.cnn(width=16)
    before = copy.deepcopy(network.state_dict())
    optimizer = optim.Muon(network, 0.03, 0.05)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=gradient_scale)
    loss = network(torch.randn(8, 3, 16, 16)).square().mean()
    scaler.scale(loss).backward()
    if poison:
        network.head.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return network, before, optimizer, scaler


def test_the_scale_of_the_loss_is_taken_out_of_the_step():
    plain, scaled = (scaled_step(scale)[0].state_dict() for scale in (1.0, 1024.0))
    assert same(plain, scaled)  # a power of two


def test_an_overflow_skips_the_step_and_halves_the_scale_without_asking():
    network, before, optimizer, scaler = scaled_step(1024.0, poison=True)
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(torch.isfinite(state["velocity"]).all() for state in optimizer.state.values())
    assert scaler.get_scale() == 512.0
