"""Each equation of the paper, 1 to 16, against a slow literal reference in float64 that loops over everything."""

import math

import pytest
import torch
from method_kit import HEADS, N_TOKENS, random_clip, some_images, train_a_little, wrap

from spotlighter_plugin.config import SpotlighterConfig
from spotlighter_plugin.method import activation, losses
from spotlighter_plugin.method.bank import SemanticMemoryBank, affinity, assign
from spotlighter_plugin.method.layout import layout_of
from spotlighter_plugin.method.mapping import FactoredText, LinearTRM, Mapping, match_texts

B, C, P, K, D, W = 3, 5, 3, 4, 64, 128
SCALE = 8.0


# ------------------------------------------------------------------------------------ the reference, one vector a time


def f64(tensor):
    return tensor.detach().double()


def unit(vector):
    return vector / vector.norm()


def cos(a, b):
    return float(unit(a) @ unit(b))


def softmax(values):
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def layer_norm(x, module):
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / (variance + module.eps) ** 0.5 * f64(module.weight) + f64(module.bias)


def pi(hidden, vision):
    return layer_norm(hidden, vision.ln_post) @ f64(vision.proj)


def head_parts(attention):
    """(W_q, b_q, W_k, b_k, W_v, b_v) rows of each head, and the columns of W_o that belong to it."""
    width, heads = attention.embed_dim, attention.num_heads
    weight, bias, size = f64(attention.in_proj_weight), f64(attention.in_proj_bias), width // heads
    for head in range(heads):
        rows = [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]
        columns = f64(attention.out_proj.weight)[:, head * size : (head + 1) * size]
        yield *((weight[r], bias[r]) for r in rows), columns


def attention_weights(query, keys, wq, wk, size):
    q = wq[0] @ query + wq[1]
    return softmax([float(q @ (wk[0] @ key + wk[1])) / size**0.5 for key in keys])


def multihead(query, keys, attention):
    """One query over a list of keys, which are the values too."""
    out = f64(attention.out_proj.bias)
    for wq, wk, wv, columns in head_parts(attention):
        weights = attention_weights(query, keys, wq, wk, len(wq[1]))
        value = sum(w * (wv[0] @ key + wv[1]) for w, key in zip(weights, keys, strict=True))
        out = out + columns @ value
    return out


def block_output(sequence, block):
    normed = [layer_norm(x, block.ln_1) for x in sequence]
    middle = [x + multihead(n, normed, block.attn) for x, n in zip(sequence, normed, strict=True)]
    result = []
    for x in middle:
        inner = f64(block.mlp.c_fc.weight) @ layer_norm(x, block.ln_2) + f64(block.mlp.c_fc.bias)
        inner = inner * torch.sigmoid(1.702 * inner)
        result.append(x + f64(block.mlp.c_proj.weight) @ inner + f64(block.mlp.c_proj.bias))
    return result


def feed_forward(x, module):
    inner = torch.nn.functional.gelu(f64(module[0].weight) @ x + f64(module[0].bias))
    return f64(module[2].weight) @ inner + f64(module[2].bias)


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), atol=atol, rtol=1e-4
    )


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def units(*shape, seed=0):
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def project(hidden, vision):
    """π, then unit length, as the wrapper does it."""
    return torch.nn.functional.normalize(layout_of(vision).read_out(hidden), dim=-1)


@pytest.fixture(scope="module")
def vision():
    return random_clip().visual


FILLED = torch.tensor(
    [[True, True, True], [True, False, True], [False, False, False], [False, True, False], [True] * 3]
)


# ---------------------------------------------------------------------------------------------------------- activation


def test_equations_1_and_2_host_logits_are_scaled_cosines_of_the_two_encoders():
    wrapper = wrap(top_k=N_TOKENS, mapping="none", prototype_logits=False)
    with torch.no_grad():
        logits = wrapper(some_images())
        image, text = wrapper.adapter.encode_image(some_images()), wrapper.adapter.encode_text()
    scale = float(wrapper.adapter.logit_scale)
    close(logits, [[scale * cos(f64(v), f64(t)) for t in text] for v in image])


def test_attention_score_is_cls_attention_averaged_over_heads(vision):
    block, hidden = vision.transformer.resblocks[1], random(1 + N_TOKENS + 2, B, W)
    score = activation.attention_score(hidden, layout_of(vision).gaze(1))[:, 1 : 1 + N_TOKENS]
    for b in range(B):
        normed = [layer_norm(f64(x), block.ln_1) for x in hidden[:, b]]
        expected = torch.zeros(N_TOKENS, dtype=torch.float64)
        for wq, wk, _, _ in head_parts(block.attn):
            weights = attention_weights(normed[0], normed, wq, wk, len(wq[1]))
            expected += 1 / HEADS * torch.tensor(weights[1 : 1 + N_TOKENS], dtype=torch.float64)
        close(score[b], expected, atol=1e-6)


def test_lens_scores_are_expected_similarities_of_tokens_and_texts(vision):
    hidden, text = random(1 + N_TOKENS, B, W), units(C, D)
    image = project(hidden[0], vision)
    target = activation.expected_text(image, text, SCALE)
    tokens = project(hidden[1:], vision).transpose(0, 1)
    lens = activation.lens_score(tokens, target)
    for b in range(B):
        p = softmax([SCALE * cos(pi(f64(hidden[0, b]), vision), f64(t)) for t in text])
        for i in range(N_TOKENS):
            state = f64(hidden[1 + i, b])
            close(lens[b, i], sum(p[c] * cos(pi(state, vision), f64(text[c])) for c in range(C)))


def test_equation_3_the_category_is_the_class_whose_mean_prototype_is_nearest():
    cls, prototypes = units(40, D), units(C, P, D)
    category = activation.match_category(cls, prototypes, FILLED)
    for b in range(40):
        best = {
            c: cos(f64(cls[b]), sum(f64(prototypes[c, p]) for p in range(P) if FILLED[c, p]))
            for c in range(C)
            if FILLED[c].any()
        }
        assert category[b] == max(best, key=best.get)


def test_semantic_score_weighs_prototypes_by_their_similarity_to_the_text():
    tokens, prototypes, target = units(B, K, D), units(B, P, D), random(B, D)
    filled = FILLED[:3].clone()
    filled[2, 0] = True
    score = activation.semantic_score(tokens, prototypes, filled, target, SCALE)
    for b in range(B):
        there = [p for p in range(P) if filled[b, p]]
        omega = softmax([SCALE * cos(f64(prototypes[b, p]), f64(target[b])) for p in there])
        for i in range(K):
            terms = (w * cos(f64(tokens[b, i]), f64(prototypes[b, p])) for w, p in zip(omega, there, strict=True))
            close(score[b, i], sum(terms))


def literal_cut(sequence, scores, kept):
    """[CLS, kept tokens, one token for the others] of [CLS, tokens], and the kept ones' places, best first."""
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    order = sorted(range(kept[0]), key=lambda i: -scores[i])
    best, rest = order[: kept[1]], order[kept[1] :] + list(range(kept[0], len(scores)))
    weights = softmax([(scores[i] - mean) / spread for i in rest])
    fused = sum(weight * sequence[1 + i] for weight, i in zip(weights, rest, strict=True))
    return [sequence[0], *(sequence[1 + i] for i in best), fused], best


def test_cuts_before_several_blocks_with_dropped_tokens_fused_are_the_tower_on_what_is_left():
    """What an early cut fused is never among the tokens of the next cut, but always in what that one fuses."""
    options = {"mapping": "none", "prototype_logits": False, "fuse_dropped": True}
    wrapper, caught = wrap(stages=((0, 9), (1, 7)), top_k=4, **options), {}
    blocks, vision = wrapper.stream.vision.transformer.resblocks, wrapper.stream.vision
    hook = vision.ln_pre.register_forward_hook(lambda module, args, out: caught.update(hidden=out))
    with torch.no_grad():
        image = wrapper.image_embeddings(some_images())
    hook.remove()
    for b, hidden in enumerate(caught["hidden"]):
        sequence, places, there = [f64(x) for x in hidden], list(range(N_TOKENS)), N_TOKENS
        for block, number in zip(blocks, (9, 7, 4), strict=True):
            normed, scores = [layer_norm(x, block.ln_1) for x in sequence], 0
            for wq, wk, _, _ in head_parts(block.attn):
                scores = scores + torch.tensor(attention_weights(normed[0], normed, wq, wk, len(wq[1])))[1:] / HEADS
            sequence, best = literal_cut(sequence, scores.tolist(), (there, number))
            places, there = [places[i] for i in best], number
            sequence = block_output(sequence, block)
        assert wrapper.kept[b].tolist() == places
        close(image[b], unit(pi(sequence[0], vision)))


# ----------------------------------------------------------------------------------------------------------- the bank


def literal_assignment(token, prototypes, filled):
    there = [p for p in range(len(prototypes)) if filled[p]]
    degrees = softmax([cos(token, prototypes[p]) for p in there])
    best = max(range(len(there)), key=lambda j: degrees[j])
    return degrees[best], there[best]


def test_equations_4_and_5_tokens_go_to_their_most_probable_prototype():
    tokens, prototypes, filled = units(B, K, D), units(B, P, D), FILLED[[0, 1, 3]]
    degree, nearest = assign(tokens, prototypes, filled)
    for b in range(B):
        for i in range(K):
            expected = literal_assignment(f64(tokens[b, i]), f64(prototypes[b]), filled[b])
            close(degree[b, i], expected[0], atol=1e-6)
            assert nearest[b, i] == expected[1]


@pytest.mark.parametrize("rows", [[0, 1, 4], [4, 4, 4], [1, 1, 0], [3, -1, 3]])
def test_equation_6_prototypes_move_to_the_weighted_mean_of_their_tokens(vision, rows):
    def onto(hidden):
        return project(hidden, vision)

    bank = SemanticMemoryBank([str(c) for c in range(C)], P, W)
    bank.prototypes, bank.filled = random(C, P, W) * FILLED.unsqueeze(-1), FILLED.clone()
    hidden = random(3, K, W)
    prototypes, filled = f64(bank.prototypes).clone(), FILLED.clone()
    bank.update(hidden, onto(hidden), torch.tensor(rows), 0.8, onto)
    for b, y in enumerate(rows):  # the first image of a class fills what is empty
        if y >= 0:
            empty = [p for p in range(P) if not filled[y, p]]
            for rank, p in enumerate(empty[:K]):
                prototypes[y, p], filled[y, p] = f64(hidden[b, rank]), True
    total, mass = torch.zeros(C, P, W, dtype=torch.float64), torch.zeros(C, P, dtype=torch.float64)
    for b, y in enumerate(rows):
        for i in range(K if y >= 0 else 0):
            joint = [pi(u, vision) for u in prototypes[y]]
            degree, j = literal_assignment(pi(f64(hidden[b, i]), vision), joint, filled[y])
            total[y, j] += degree * f64(hidden[b, i])
            mass[y, j] += degree
    for y in range(C):
        for j in range(P):
            if mass[y, j] > 0:
                prototypes[y, j] = 0.8 * prototypes[y, j] + 0.2 * total[y, j] / mass[y, j]
    close(bank.prototypes, prototypes)
    assert torch.equal(bank.filled, filled)


def test_equation_7_local_loss_is_the_cross_entropy_of_tokens_and_prototypes():
    tokens, prototypes, labels = units(B, K, D), units(C, P, D), torch.tensor([0, 4, 3])
    refined, category = units(B, P, D, seed=1), torch.tensor([0, 1, 1])
    match = affinity(tokens, prototypes, FILLED)
    plain = losses.local_loss(match, labels, SCALE)
    final = losses.local_loss(losses.refine_affinity(match, tokens, refined, category), labels, SCALE)

    def literal(b, c, with_refined):
        best = []
        for i in range(K):
            candidates = [prototypes[c, p] for p in range(P) if FILLED[c, p]]
            if with_refined and c == category[b]:
                candidates = refined[b]
            best.append(max(cos(f64(tokens[b, i]), f64(u)) for u in candidates))
        return SCALE * sum(best) / K

    for loss, with_refined in ((plain, False), (final, True)):
        expected = 0
        for b in range(B):
            there = [c for c in range(C) if FILLED[c].any()]
            p = softmax([literal(b, c, with_refined) for c in there])
            expected -= math.log(p[there.index(int(labels[b]))]) / B
        close(loss, expected)


# ---------------------------------------------------------------------------------------------------------- IRM and TRM


def full_mapping(**options):
    mapping = Mapping(SpotlighterConfig(mapping="full", prototypes_in="sequence", **options), W, D, HEADS)
    torch.manual_seed(3)
    for parameter in mapping.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return mapping


def literal_irm(prototypes, tokens, block, ffn):
    keys = [layer_norm(x, block.ln_1) for x in tokens]
    refined = []
    for u in prototypes:
        t = multihead(layer_norm(u, block.ln_1), keys, block.attn) + u  # Eq. 8
        refined.append(feed_forward(layer_norm(t, block.ln_2), ffn) + t)  # Eq. 9
    return refined


def test_equations_8_and_9_prototypes_look_at_tokens_through_the_blocks_attention_and_a_trained_ffn(vision):
    block, irm = vision.transformer.resblocks[2], full_mapping().irm
    prototypes, tokens = random(P, B, W), random(K, B, W)
    refined = irm(prototypes, tokens, layout_of(vision), 2)
    for b in range(B):
        expected = literal_irm(f64(prototypes[:, b]), f64(tokens[:, b]), block, irm.feed_forward)
        close(refined[:, b], torch.stack(expected))


def test_equation_10_refined_prototypes_and_tokens_go_through_the_towers_own_blocks():
    wrapper = wrap(select_block=1, mapping="none", prototype_logits=False)
    stream, vision, images = wrapper.stream, wrapper.stream.vision, some_images(2)
    kept, extra = torch.tensor([[3, 0, 15], [7, 8, 9]]), random(P, 2, W)
    seen = {}

    def choose(tower, hidden):
        seen["hidden"] = hidden
        return tower.sequence(hidden, tower.tokens(hidden, kept), extra)

    with torch.no_grad(), stream.selecting(choose) as tower:
        image = wrapper.adapter.encode_image(images)
        output = tower.output
    for b in range(2):
        hidden = f64(seen["hidden"][:, b])
        sequence = [hidden[0], *f64(extra[:, b]), *(hidden[1 + i] for i in kept[b])]
        for block in list(vision.transformer.resblocks)[1:]:
            sequence = block_output(sequence, block)
        close(output[:, b], torch.stack(sequence))
        close(image[b], pi(sequence[0], vision))


def literal_texts(text, tokens, trm):
    """t^rep before normalization for one image, Eq. 11."""
    weight, bias, texts = f64(trm.linear.weight), f64(trm.linear.bias), []
    for t in f64(text):
        attention = softmax([SCALE * cos(t, z) for z in f64(tokens)])
        mixed = sum(a * z for a, z in zip(attention, f64(tokens), strict=True))
        texts.append(t + trm.alpha * (weight @ torch.cat([t, mixed]) + bias))
    return texts


def test_equation_11_factored_cosines_and_means_are_those_of_the_texts_written_out():
    torch.manual_seed(0)
    trm, text, tokens, image = LinearTRM(D, 0.2), units(C, D), units(B, K, D), units(B, D)
    torch.nn.init.normal_(trm.linear.weight, std=0.2)
    torch.nn.init.normal_(trm.linear.bias, std=0.2)
    factored = trm(text, tokens, SCALE)
    written = [literal_texts(text, tokens[b], trm) for b in range(B)]
    close(factored.cosine(image), [[cos(f64(image[b]), t) for t in written[b]] for b in range(B)], atol=1e-5)
    close(factored.mean(), torch.stack([sum(unit(written[b][c]) for b in range(B)) / B for c in range(C)]), atol=1e-5)
    close(FactoredText(text).mean(), torch.stack([unit(f64(t)) for t in text]))


# --------------------------------------------------------------------------------------------------------------- losses


def test_equation_12_the_classification_loss_is_the_cross_entropy_of_scaled_cosines():
    wrapper = wrap(mapping="full", prototypes_in="none", prototype_logits=False, losses=())
    wrapper.train()
    torch.nn.init.normal_(wrapper.plugin.mapping.trm.linear.weight, std=0.1)
    labels = torch.tensor([0, 5, 2])
    output = wrapper(some_images(3), labels)
    expected = -sum(math.log(softmax(f64(output["logits"][b]).tolist())[labels[b]]) for b in range(3)) / 3
    close(output["cls"], expected)
    close(output["loss"], expected)


def test_equation_13_text_regularisation_is_the_mean_distance():
    text, frozen = units(C, D), units(C, D, seed=1)
    expected = sum(abs(float(f64(frozen)[c, i] - f64(text)[c, i])) for c in range(C) for i in range(D)) / (C * D)
    close(losses.text_regularisation(text, frozen), expected, atol=1e-7)


def test_equation_14_visual_divergence_is_kl_from_all_tokens_to_kept_tokens():
    image, full, text = units(B, D), units(B, D, seed=1), units(C, D)
    expected = 0
    for b in range(B):
        p = softmax([SCALE * cos(f64(full[b]), f64(t)) for t in text])
        q = softmax([SCALE * cos(f64(image[b]), f64(t)) for t in text])
        expected += sum(p[c] * math.log(p[c] / q[c]) for c in range(C)) / B
    close(losses.visual_divergence(image, full, text, SCALE), expected)


def test_equation_15_the_total_weighs_the_parts():
    values = {"cls": 1.0, "gra": 2.0, "reg_text": 3.0, "kl_visual": 4.0, "local": 5.0}
    parts = {name: torch.tensor(value) for name, value in values.items()}
    close(losses.total_loss(parts, 0.02, 20.0, 0.1), 1 + 0.02 * 2 + 20 * 3 + 0.1 * (4 + 5))
    close(losses.total_loss({"cls": parts["cls"]}, 0.02, 20.0, 0.1), 1.0)


# -------------------------------------------------------------------------------------------------- all of it, Eq. 3-16


@pytest.mark.parametrize("prototypes_in", ["readout", "sequence"])
def test_equation_16_a_whole_prediction_is_that_of_the_equations_in_a_row(prototypes_in):
    wrapper = wrap(mapping="full", prototypes_in=prototypes_in, prototype_logits=False, semantic_activation=True)
    train_a_little(wrapper, steps=2)
    with torch.no_grad():
        for parameter in wrapper.plugin.mapping.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, seen = some_images(2, seed=50), {}
    keep = wrapper.stream.block.register_forward_pre_hook(
        lambda m, args: seen.setdefault("hidden", args[0]), prepend=True
    )
    with torch.no_grad():
        logits = wrapper(images)
    keep.remove()
    assert torch.equal(logits.argmax(-1), literal_prediction(wrapper, seen["hidden"], logits))


def literal_prediction(wrapper, all_hidden, logits):
    """Compares the logits with those of the equations on the way; returns the predicted classes."""
    vision, block, mapping, bank = (
        wrapper.stream.vision,
        wrapper.stream.block,
        wrapper.plugin.mapping,
        wrapper.plugin.bank,
    )
    scale, size = float(wrapper.adapter.logit_scale), W // HEADS
    text = [unit(f64(t)) for t in wrapper.adapter.encode_text()]
    predictions = []
    for b in range(all_hidden.shape[1]):
        hidden = f64(all_hidden[:, b])
        tokens, cls = list(hidden[1:]), pi(hidden[0], vision)
        joint = [unit(pi(h, vision)) for h in tokens]
        # activation and Eq. 3
        normed = [layer_norm(h, block.ln_1) for h in hidden]
        sample = torch.zeros(N_TOKENS, dtype=torch.float64)
        for wq, wk, _, _ in head_parts(block.attn):
            sample += torch.tensor(attention_weights(normed[0], normed, wq, wk, size)[1:]).double() / HEADS
        stored = [[unit(pi(f64(u), vision)) for u in own] for own in bank.prototypes]
        category = max(range(len(stored)), key=lambda c: cos(cls, sum(stored[c])))
        p = softmax([scale * cos(cls, t) for t in text])
        target = sum(p[c] * text[c] for c in range(len(text)))
        omega = softmax([scale * cos(u, target) for u in stored[category]])
        semantic = torch.tensor(
            [sum(w * cos(z, u) for w, u in zip(omega, stored[category], strict=True)) for z in joint]
        ).double()
        scores = sum((s - s.mean()) / s.std(unbiased=False) for s in (sample, semantic))
        kept = sorted(range(N_TOKENS), key=lambda i: -scores[i])[: wrapper.config.top_k]
        # Eq. 8-10
        ffn = mapping.irm.feed_forward
        refined = literal_irm(f64(bank.prototypes[category]), [tokens[i] for i in kept], block, ffn)
        inside = wrapper.config.prototypes_in == "sequence"
        sequence = [hidden[0], *(refined if inside else []), *(tokens[i] for i in kept)]
        output = block_output(sequence, block)
        read = output[1 : 1 + len(refined)] if inside else refined
        weight = float(mapping.readout_weight.detach())
        image = pi(output[0], vision) + weight * sum(pi(u, vision) for u in read) / len(read)
        # Eq. 11 and 16
        expected = []
        for t in text:
            match = softmax([scale * cos(t, joint[i]) for i in kept])
            mixed = sum(a * joint[i] for a, i in zip(match, kept, strict=True))
            linear = mapping.trm.linear
            rep = t + wrapper.config.alpha * (f64(linear.weight) @ torch.cat([t, mixed]) + f64(linear.bias))
            expected.append(scale * cos(image, rep))
        close(logits[b], expected, atol=2e-3)
        predictions.append(max(range(len(text)), key=lambda c: expected[c]))
    return torch.tensor(predictions)


def test_texts_are_matched_with_tokens_as_in_equation_4_with_the_temperature():
    text, tokens = units(C, D), units(B, K, D)
    weights = match_texts(text, tokens, SCALE)
    for b in range(B):
        for c in range(C):
            close(weights[b, c], softmax([SCALE * cos(f64(text[c]), f64(z)) for z in tokens[b]]), atol=1e-6)
