"""A training step on CUDA as one launch: a CUDA graph.

    step = Recorded(step, device)       # step(x, labels, rate, share) -> tensors; called as before

Networks here are so small that launching a step's 600 kernels takes ten times as long as they
compute (RESULTS.md, "On a GPU"). Recorded once and replayed, they are one launch. This file works
alone, with any step that asks the device for no number.
"""

import warnings

import torch


class Recorded:
    """A step, recorded once for a shape of batch, then replayed.

    A replay reads the memory that was recorded, so batches are copied there, and the rate and the
    share are tensors. Before a shape is recorded, WARM_UP steps of it in a row run as they are
    written: real ones, which warm the libraries up. So an epoch's last, smaller batch never is, and
    one recording is held, of today's crops. Where recording fails, every step runs as written.
    device: CUDA's current one (`torch.cuda.set_device`).
    """

    WARM_UP = 3

    def __init__(self, step, device):
        self.step, self.graph, self.failed = step, None, False
        self.held = None  # the shape that is recorded
        self.shape, self.times = None, 0  # of the latest batch; how many of it came in a row
        self.rate, self.share = torch.zeros(2, device=device).unbind()
        self.stream = torch.cuda.Stream(device)

    def __call__(self, x, labels, rate, share):
        self.rate.fill_(rate)
        self.share.fill_(share)
        self.times = self.times + 1 if x.shape == self.shape else 1
        self.shape = x.shape
        if x.shape != self.held and self.times > self.WARM_UP and not self.failed:
            self.record(x, labels)
        if x.shape != self.held:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.step(x, labels, self.rate, self.share)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        for recorded, new in zip(self.inputs, (x, labels), strict=True):
            recorded.copy_(new)
        self.graph.replay()
        return [result.clone() for result in self.results]

    def record(self, x, labels):
        """Record the step for the shape of x: calls are noted, and nothing is computed."""
        self.held = self.graph = self.results = None  # what was recorded frees its memory first
        self.inputs, graph = [x.clone(), labels.clone()], torch.cuda.CUDAGraph()
        try:  # where a recording breaks off, the outer block brings the stream back
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.results = self.step(*self.inputs, self.rate, self.share)
            self.graph, self.held = graph, x.shape
        except RuntimeError as error:
            self.failed, cause = True, error.__context__ or error
            warnings.warn(f"steps are not recorded, and slower: {str(cause).splitlines()[0]}",
                          stacklevel=2)
