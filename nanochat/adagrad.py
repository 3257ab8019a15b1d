"""Adagrad with one statistic per row, for tables of which a batch looks up few rows.

DLRM trains its sparse features so (arXiv 1906.00091). AdamW would read and write all of a table of
hundreds of thousands of rows, three times over, for the few thousand rows that a step looks up; its
momentum would also move rows long after their tokens were seen. Here a row moves only when it is
looked up: by lr (root mean square of the row's update) at first, by lr / sqrt(n) at the n-th time.

The optimizer knows no ranks. Every row is updated by itself: parallel.Layout may give a rank any
slice of whole rows.
"""
import torch

SMALLEST = 1e-30  # of the sum of squares, so that its inverse square root is finite


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad for tables (N, C). Gradients may be sparse (nn.Embedding(sparse=True)) or dense.

    State of a table: `squares` (N, 1), the sum over steps of the mean square of a row's gradient.
    """

    partition = "rows"

    def __init__(self, params, lr=0.5):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Update the tables from their gradients; a table without one is skipped."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                if table.grad.is_sparse:
                    self._update_rows(table, group["lr"])
                else:
                    self._update_table(table, group["lr"])

    def state_of(self, table):
        """The state of a table, made where there is none."""
        state = self.state[table]
        if not state:
            state["squares"] = torch.zeros(len(table), 1, device=table.device)
        return state

    def _update_rows(self, table, lr):
        """Read and write the rows of a sparse gradient only."""
        squares = self.state_of(table)["squares"]
        sparse = table.grad.coalesce()
        rows = sparse.indices()[0]
        grad = sparse.values()

        squares.index_add_(0, rows, grad.square().mean(dim=1, keepdim=True))
        update = grad * squares[rows].clamp(min=SMALLEST).rsqrt_()
        table.index_add_(0, rows, update, alpha=-lr)

    def _update_table(self, table, lr):
        """The same from a dense gradient: rows whose gradient is zero stay as they are.

        Selecting the other rows first would make the host wait for the device.
        """
        squares = self.state_of(table)["squares"]
        grad = table.grad.float()

        squares.add_(grad.square().mean(dim=1, keepdim=True))
        update = grad * squares.clamp(min=SMALLEST).rsqrt_()
        table.sub_(update.to(table.dtype), alpha=lr)
