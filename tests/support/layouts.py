"""The same values laid out differently in memory, with NaN between them: what a program reads past its mask shows."""

import torch


def every_second(t):
    spread = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    spread[..., ::2] = t
    return spread[..., ::2]


def transposed(t):
    return t.t().contiguous().t() if t.dim() == 2 else every_second(t)


def inside_nan(t):
    room = torch.full([n + 4 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    inside = room[tuple(slice(2, n + 2) for n in t.shape)]
    return inside.copy_(t)


def unaligned(t):
    storage = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


def expanded(t):
    """Along the shortest dimension (of a bias: its one) all entries are the first: stride 0."""
    return t.narrow(min(range(t.dim()), key=t.size), 0, 1).expand(t.shape)


def dense(t):
    return t


# The last two change every second tensor, and the others. Were all expanded, results would repeat, and have fewer errors
# of their own than the tolerance rule takes them for.
LAYOUTS = {f.__name__: (f, f) for f in (every_second, transposed, inside_nan, unaligned)}
LAYOUTS |= {"expanded": (expanded, dense), "others expanded": (dense, expanded)}
