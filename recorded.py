"""A training step on CUDA as one launch: a CUDA graph.

    step = Recorded(step, device)       # step(x, labels, rate, share) -> tensors; called as before

Networks here are so small that launching a step's 600 kernels takes ten times as long as they
compute (RESULTS.md, "On a GPU"). Recorded once and replayed, they are one launch. This file works
alone, with any step that asks the device for no number.
"""

import warnings

import torch


class Recorded:
    """A step, recorded once for each shape of batch, then replayed.

    A replay reads the memory that was recorded, so batches are copied there, and the rate and the
    share are tensors. The first steps of a shape run as they are written: real ones, which warm the
    libraries up. Where recording fails, every step runs as written.
    """

    WARM_UP = 3

    def __init__(self, step, device):
        self.step, self.shapes, self.written = step, {}, {}  # of each shape: graph; steps so far
        self.rate, self.share = torch.zeros(2, device=device).unbind()
        self.stream = torch.cuda.Stream(device)

    def __call__(self, x, labels, rate, share):
        self.rate.fill_(rate)
        self.share.fill_(share)
        written = self.written.get(x.shape, 0)
        if written == self.WARM_UP:
            self.record(x, labels)
        if x.shape not in self.shapes:
            self.written[x.shape] = written + 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.step(x, labels, self.rate, self.share)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        graph, inputs, results = self.shapes[x.shape]
        torch._foreach_copy_(inputs, [x, labels])
        graph.replay()
        return [result.clone() for result in results]

    def record(self, x, labels):
        """Record the step for the shape of x: calls are noted, and nothing is computed.

        Crops only grow: what was recorded for another side is dropped, and its memory with it.
        """
        self.shapes = {shape: of for shape, of in self.shapes.items() if shape[1:] == x.shape[1:]}
        inputs, graph = [x.clone(), labels.clone()], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = self.step(*inputs, self.rate, self.share)
            self.shapes[x.shape] = graph, inputs, results
        except RuntimeError as error:
            warnings.warn(f"steps are not recorded, and slower: {str(error).splitlines()[0]}",
                          stacklevel=2)
