"""SALAD (arXiv 2601.16515), for which no code is released: the formula in f64.

Where the paper leaves room, this is slalom's reading (kernels/README.md): the ReLU stands before the
rotation, the denominator is not rotated, the gate of a sample is the mean of its tokens' gates.
"""

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from .common import must_agree, must_matter, normal
from .sla import CRITICAL, Processor, random_classes, rotate, sparse_branch, sparsity, spread

SOURCE = "formula in salad.py, f64"


def rotary_tables(grid, width):
    rope = WanRotaryPosEmbed(width, (1, 1, 1), 1024)
    return rope(torch.zeros(1, 1, *grid))


def topk_map(q, k, topk, block_q, block_k):
    """Means of the rows that are really in a block; ties go to the lower index. [B, H, L, D]."""

    def pool(x, block):
        return torch.stack([part.mean(-2) for part in x.split(block, -2)], -2)

    scores = pool(q, block_q) @ pool(k, block_k).transpose(-1, -2)
    count = max(1, int(topk * scores.shape[-1]))
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    classes = torch.full(scores.shape, 2, dtype=torch.uint8)
    return classes.scatter(-1, order, CRITICAL)


def window_map(batch, heads, length, topk, block_q, block_k):
    """As many neighbouring key blocks as topk would keep, around each query block's middle row."""
    rows, columns = -(-length // block_q), -(-length // block_k)
    count = max(1, int(topk * columns))
    classes = torch.full((batch, heads, rows, columns), 2, dtype=torch.uint8)
    for row in range(rows):
        begin = row * block_q
        middle = begin + (min(block_q, length - begin) - 1) // 2
        first = min(max(middle // block_k - (count - 1) // 2, 0), columns - count)
        classes[:, :, row, first : first + count] = CRITICAL
    return classes


def time_last(grid):
    """Token order (y, x, t) as indices into the raster order (t, y, x)."""
    return torch.arange(grid[0] * grid[1] * grid[2]).reshape(grid).permute(1, 2, 0).flatten()


def formula(x, q, k, v, rotary, classes, params, gate, blocks, window_grid=None):
    """q, k [B, L, H, D] after RMSNorm, before RoPE -> ([B, L, d], gate [B, L])."""
    x, q, k, v = (t.double() for t in (x, q, k, v))
    params = {n: t.double() for n, t in params.items()}
    heads = [t.transpose(1, 2) for t in (rotate(q, rotary), rotate(k, rotary), v)]
    pairs = spread(classes, *blocks, q.shape[1])
    if window_grid is not None:  # the second half of the heads lays its blocks over (y, x, t)
        order = time_last(window_grid)
        back = torch.argsort(order)
        half = pairs.shape[1] // 2
        pairs = torch.cat([pairs[:, :half], pairs[:, half:][..., back, :][..., back]], 1)
    sparse = sparse_branch(*heads, pairs).transpose(1, 2).flatten(2)

    qh, kh = torch.relu(q), torch.relu(k)
    weights = rotate(qh, rotary).transpose(1, 2) @ rotate(kh, rotary).transpose(1, 2).mT
    denominator = (qh * kh.sum(1, keepdim=True)).sum(-1) + 1e-5  # [B, L, H]
    linear = (weights @ heads[2]).transpose(1, 2) / denominator[..., None]
    g = torch.sigmoid(x @ params["gate_weight"].T + params["gate_bias"])  # [B, L, 1]
    if gate == "sample":
        g = g.mean(1, keepdim=True).expand_as(g)
    out = sparse + g * (linear.flatten(2) @ params["proj_weight"].T + params["proj_bias"])
    return out.float(), g[..., 0].float()


def plain_bf16(x, q, k, v, rotary, classes, params, gate, blocks):
    """The same, raster order, with bf16 tensors between the steps: for the error rule of bf16 runs."""
    x, q, k, v = (t.bfloat16() for t in (x, q, k, v))
    low = {n: t.bfloat16() for n, t in params.items()}
    turned = [rotate(t.float(), rotary).bfloat16().transpose(1, 2)
              for t in (q, k, torch.relu(q), torch.relu(k))]
    v = v.transpose(1, 2)
    scores = turned[0].float() @ turned[1].float().mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(spread(classes, *blocks, q.shape[1]) != CRITICAL, -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    sparse = ((p.bfloat16().float() @ v.float()) / p.sum(-1, keepdim=True)).bfloat16()
    sums = torch.relu(q) * torch.relu(k).sum(1, keepdim=True)
    linear = (turned[2] @ (turned[3].mT @ v)).transpose(1, 2) / (sums.sum(-1) + 1e-5)[..., None]
    g = torch.sigmoid(x @ low["gate_weight"].T + low["gate_bias"])
    if gate == "sample":
        g = g.mean(1, keepdim=True)
    branch = linear.flatten(2) @ low["proj_weight"].T + low["proj_bias"]
    return sparse.transpose(1, 2).flatten(2) + g * branch


def make_inputs(seed, batch, heads, width, length):
    bhld, d = (batch, heads, length, width), heads * width
    return {
        "q": normal(seed, "q", *bhld), "k": normal(seed, "k", *bhld), "v": normal(seed, "v", *bhld),
        "x": normal(seed, "x", batch, length, d),
        "proj_weight": normal(seed, "proj_weight", d, d, std=0.15),
        "proj_bias": normal(seed, "proj_bias", d, std=0.2),
        "gate_weight": normal(seed, "gate_weight", 1, d, std=0.15),
        "gate_bias": normal(seed, "gate_bias", 1),
    }


PARAMS = ("proj_weight", "proj_bias", "gate_weight", "gate_bias")


def run(inputs, grid, kind, gate, classes, **changed):
    params = {n: inputs[n] for n in PARAMS} | changed
    blhd = [inputs[n].transpose(1, 2) for n in ("q", "k", "v")]
    return formula(inputs["x"], *blhd, rotary_tables(grid, inputs["q"].shape[-1]), classes, params,
                   gate, (8, 8), grid if kind == "window" else None)


def write(goldens, case, inputs, grid, kind, gate, classes, shared=None):
    out, g = run(inputs, grid, kind, gate, classes)
    outputs = {"o": out, "map": classes, "sparsity": sparsity(classes), "gate": g}
    if kind == "topk" and "map" in inputs:  # a map of one's own may choose otherwise in bf16
        blhd = [inputs[n].transpose(1, 2) for n in ("q", "k", "v")]
        outputs["o_bf16"] = plain_bf16(
            inputs["x"], *blhd, rotary_tables(grid, inputs["q"].shape[-1]), classes,
            {n: inputs[n] for n in PARAMS}, gate, (8, 8))
        must_agree("plain bf16", outputs["o_bf16"], out, 3e-2)
    args = ["salad", "--grid", ",".join(map(str, grid)), "--topk", "0.4", "--block-q", "8",
            "--block-k", "8", "--map", kind, "--gate", gate]
    goldens.write(case, args, inputs, outputs, source=SOURCE, shared=shared)
    return out


def make(goldens):
    grid = (3, 2, 4)
    inputs = make_inputs(41, 2, 2, 64, 24)
    classes = random_classes(42, 4, 3, 3, critical=1, negligible=0).reshape(2, 2, 3, 3)
    inputs["map"] = classes
    token = write(goldens, "salad_topk_token", inputs, grid, "topk", "token", classes, "salad")
    sample = write(goldens, "salad_topk_sample", inputs, grid, "topk", "sample", classes, "salad")
    window = write(goldens, "salad_window_token", inputs, grid, "window", "token", classes, "salad")
    must_matter("the gate's granularity", sample, token)
    must_matter("the window's token order", window, token)
    for name in PARAMS:
        zero = {name: torch.zeros_like(inputs[name])}
        must_matter(name, run(inputs, grid, "topk", "token", classes, **zero)[0], token)

    grid = (2, 3, 5)  # 30 tokens: the last block is ragged
    inputs = make_inputs(43, 1, 1, 64, 30)
    rotary = rotary_tables(grid, 64)
    q, k = (rotate(inputs[n].transpose(1, 2), rotary).transpose(1, 2) for n in ("q", "k"))
    for kind, classes in (("topk", topk_map(q, k, 0.4, 8, 8)),
                          ("window", window_map(1, 1, 30, 0.4, 8, 8))):
        write(goldens, f"salad_own_{kind}", inputs, grid, kind, "token", classes, "salad_own")


def install(model, tensors, settings, grid):
    """Replaces the self attention of every block; dropped layers keep the sparse branch alone."""
    for n, block in enumerate(model.blocks):
        dropped = n in settings["dropped_layers"]
        width = model.config.num_attention_heads * model.config.attention_head_dim
        params = {"proj_weight": torch.zeros(width, width), "proj_bias": torch.zeros(width),
                  "gate_weight": torch.zeros(1, width), "gate_bias": torch.zeros(1)}
        if not dropped:
            for name in params:
                params[name] = tensors[
                    f"blocks.{n}.attn1.salad.{name.replace('_', '.')}"].bfloat16().float()

        def attention(x, q, k, v, rotary, params=params):
            rotated = [rotate(t, rotary).transpose(1, 2) for t in (q, k)]
            blocks = settings["block_q"], settings["block_k"]
            classes = topk_map(*rotated, settings["topk"], *blocks)
            return formula(x, q, k, v, rotary, classes, params, settings["gate"], blocks)[0]

        block.attn1.set_processor(Processor(attention))
