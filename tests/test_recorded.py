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


CPU = torch.device("cpu")
SHAPES = [(8, 16)] * 6 + [(5, 16)] + [(8, 16)] * 3 + [(5, 16)] + [(8, 24)] * 5  # photos, side


class NoStream:
    def wait_stream(self, other):
        pass


class Graph:
    """What stands for a CUDA graph: a replay is the step once more, on the memory recorded."""

    made = []

    def __init__(self):
        self.replays = 0
        self.made.append(self)

    def replay(self):
        self.replays += 1
        for held, new in zip(self.results, self.step(*self.inputs), strict=True):
            held.copy_(new)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """CUDA's streams and graphs, without CUDA; the graphs that a test records."""
    recording = []

    @contextlib.contextmanager
    def record(graph):
        recording.append(graph)
        yield
        recording.pop()

    def noted(step):
        """The step, of which a recording computes nothing."""
        def call(*inputs):
            if not recording:
                return step(*inputs)
            graph = recording[0]
            graph.step, graph.inputs, graph.results = step, inputs, torch.zeros(2).unbind()
            return graph.results

        return call

    init = recorded.Recorded.__init__
    monkeypatch.setattr(recorded.Recorded, "__init__",
                        lambda self, step: init(self, noted(step), CPU))
    monkeypatch.setattr(Graph, "made", [])
    for name, stand_in in dict(Stream=lambda device=None: NoStream(), current_stream=NoStream,
                               stream=lambda stream: contextlib.nullcontext(), graph=record,
                               CUDAGraph=Graph).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return Graph.made


def small_training(wrap, shapes=SHAPES, scaler=None, precision=PRECISION):
    """Weights, average and losses after steps on batches of `shapes`; wrap: of the step."""
    torch.manual_seed(0)
    network = models.cnn(width=16)
    optimizer, average = optim.Muon(network, 0.03, 0.05), optim.Average(network)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    step = wrap(train.make_step(network, optimizer, scaler, average, precision, 0.1))
    losses = []
    for i, (photos, side) in enumerate(shapes):
        x = torch.randn(photos, 3, side, side)
        labels = torch.randint(10, (photos,))
        loss, right = step(x, labels, 0.01 * (i + 1), average.next_share())
        losses.append(loss)
        assert 0 <= right <= photos
    return network.state_dict(), average.module.state_dict(), torch.stack(losses)


def written(step):
    """The step as it is written, its numbers as tensors: what is recorded on CUDA."""
    return lambda x, labels, rate, share: step(x, labels, torch.tensor(rate), torch.tensor(share))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_replayed_steps_are_the_steps_that_are_written(graphs):
    network, average, losses = small_training(written)
    again, average_again, losses_again = small_training(recorded.Recorded)
    assert same(again, network) and same(average_again, average)
    assert torch.equal(losses_again, losses)  # kept, though the next replay overwrites them
    assert len(losses.unique()) == len(losses)


def test_a_shape_is_recorded_once_after_three_steps_in_a_row_and_then_replayed(graphs):
    small_training(recorded.Recorded)
    assert [graph.replays for graph in graphs] == [3 + 3, 2]  # of 16 px, then of 24
    assert [tuple(graph.inputs[0].shape) for graph in graphs] == [(8, 3, 16, 16), (8, 3, 24, 24)]


def test_last_batches_of_epochs_are_not_recorded(graphs):
    small_training(recorded.Recorded, 5 * ([(4, 16)] * 2 + [(3, 16)]))
    assert not graphs


def test_what_was_recorded_is_dropped_before_another_shape_is(graphs, monkeypatch):
    step, left = recorded.Recorded(lambda x, *_: [x.sum(), x.sum()]), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: left.append(step.graph) or Graph())
    for side in (16, 24):
        for _ in range(4):
            step(torch.ones(2, 3, side, side), torch.ones(2), 0.1, 0.1)
    assert left == [None, None] and [graph.replays for graph in graphs] == [1, 1]


def test_a_rate_that_is_a_tensor_gives_the_step_of_a_number():
    (a, *_), (b, *_) = (small_training(wrap, SHAPES[:1]) for wrap in (written, lambda step: step))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_where_recording_fails_steps_run_as_they_are_written_and_say_why_once(monkeypatch):
    @contextlib.contextmanager
    def refuse(graph):
        try:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        except RuntimeError:
            raise RuntimeError("failed due to a previous error")  # noqa: B904
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="not recorded.*operation not permitted$") as said:
        found = small_training(recorded.Recorded)
    assert same(found[0], small_training(written)[0])
    assert len(said) == 1


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
