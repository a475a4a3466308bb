import pytest
import small_clip
import torch
from small_clip import images, texts

from trimtab.adaptation.vision_language import (
    ImageQueries,
    PromptedClasses,
    TextQueries,
    VisionLanguage,
    embed,
    image_parameters,
    prompt_parameters,
    text_parameters,
)
from trimtab.core.checks import InputError

MODELS = [
    small_clip.transformers_clip,
    small_clip.transformers_siglip,
    pytest.param(small_clip.open_clip_clip, marks=pytest.mark.vision),
    pytest.param(small_clip.open_clip_siglip, marks=pytest.mark.vision),
]
every_model = pytest.mark.parametrize("make", MODELS)


def own_logits(model, x, tokens):
    """The logits of images over texts by the library's own forward pass."""
    if hasattr(model, "get_image_features"):
        return model(pixel_values=x, input_ids=tokens).logits_per_image
    return model.get_logits(x, tokens)[0]


@every_model
def test_logits_are_the_library_s_own(make):
    model = make()
    x, tokens = images(3), texts(5)
    expected = own_logits(model, x, tokens)
    face = VisionLanguage(model)
    torch.testing.assert_close(face.logits(face.encode_image(x), face.encode_text(tokens)), expected)
    queries = ImageQueries(face, embed(face, face.encode_text, tokens.split(2)))
    torch.testing.assert_close(queries(x), expected)
    queries = TextQueries(face, embed(face, face.encode_image, x.split(2)))
    torch.testing.assert_close(queries(tokens), expected.T)
    torch.testing.assert_close(PromptedClasses(face, tokens)(x), expected)
    torch.testing.assert_close(face.encode_image(x).norm(dim=1), torch.ones(3))


@every_model
def test_a_context_stands_in_for_words(make):
    """Other words by their embeddings are the same as other words by their tokens."""
    face = VisionLanguage(make())
    tokens = texts(4)
    other = torch.tensor([11, 12, 13, 14])
    said = tokens.clone()
    said[:, 1:5] = other
    with torch.no_grad():
        expected, before = face.encode_text(said), face.encode_text(tokens)
        torch.testing.assert_close(face.encode_text(tokens, face.token_embedding(other)), expected)
        assert torch.equal(face.encode_text(tokens), before)
    policy = PromptedClasses(face, tokens, context=face.token_embedding(other).detach())
    torch.testing.assert_close(policy(images(2)), ImageQueries(face, expected)(images(2)))


@every_model
def test_the_parts_to_tune_are_those_that_matter(make):
    face = VisionLanguage(make())
    x, tokens = images(2), texts(4)
    gallery = embed(face, face.encode_text, [tokens])
    pictures = embed(face, face.encode_image, [x])
    cases = [
        (ImageQueries(face, gallery), x, image_parameters),
        (TextQueries(face, pictures), tokens, text_parameters),
        (PromptedClasses(face, tokens), x, prompt_parameters),
    ]
    for policy, inputs, choose in cases:
        chosen = choose(policy)
        policy.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        policy(inputs)[0, 0].backward()
        reached = {name for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad()
        policy.requires_grad_(True)
        policy(inputs)[0, 0].backward()
        everything = {name for name, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad()
        assert reached
        assert reached <= set(chosen)
        assert set(chosen) & everything == reached
    policy = cases[2][0]
    assert not set(image_parameters(policy)) & set(text_parameters(policy))
    both = {**image_parameters(policy), **text_parameters(policy), **prompt_parameters(policy)}
    assert {n.split(".")[-1] for n in set(dict(policy.named_parameters())) - set(both)} <= {"logit_scale", "logit_bias"}


@pytest.mark.parametrize("make", [small_clip.transformers_clip, small_clip.transformers_siglip])
def test_weights_on_disk_of_transformers(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    face = VisionLanguage(type(model).from_pretrained(tmp_path).eval())
    x, tokens = images(2), texts(3)
    expected = own_logits(model, x, tokens)
    torch.testing.assert_close(face.logits(face.encode_image(x), face.encode_text(tokens)), expected)


@pytest.mark.vision
def test_weights_on_disk_of_open_clip(tmp_path):
    from safetensors.torch import save_file

    model = small_clip.open_clip_clip()
    with torch.no_grad():
        model.logit_scale += 0.5
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    face = VisionLanguage(small_clip.open_clip_clip(pretrained=str(tmp_path / "model.safetensors")))
    x, tokens = images(2), texts(3)
    expected = own_logits(model, x, tokens)
    torch.testing.assert_close(face.logits(face.encode_image(x), face.encode_text(tokens)), expected)


def test_embedding_a_gallery_leaves_the_model_alone():
    model = small_clip.transformers_clip().train()
    face = VisionLanguage(model)
    gallery = embed(face, face.encode_text, [texts(3), texts(2)])
    assert gallery.shape == (5, 12)
    assert not gallery.requires_grad
    assert model.training
    with pytest.raises(InputError, match="at least one batch"):
        embed(face, face.encode_text, [])


def test_a_model_in_half_precision_gives_features_in_single():
    face = VisionLanguage(small_clip.transformers_clip().to(torch.bfloat16))
    features = face.encode_image(images(2).bfloat16())
    assert features.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float64):
        gallery = features.detach().to(dtype)
        torch.testing.assert_close(
            ImageQueries(face, gallery)(images(1).bfloat16()), face.logits(features[:1], gallery.float())
        )


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match=r"CLIP or SigLIP model of open_clip or transformers.*got Flatten"):
        VisionLanguage(torch.nn.Flatten())
    face, tokens = VisionLanguage(small_clip.transformers_clip()), texts(4)
    with pytest.raises(InputError, match="not in row 2"):
        PromptedClasses(face, torch.cat((tokens[:2], tokens[2:].roll(1, 1))))
    with pytest.raises(InputError, match=r"context must have shape \(4, 16\), got \(3, 16\)"):
        PromptedClasses(face, tokens, context=torch.zeros(3, 16))
    with pytest.raises(InputError, match="length must be at most 7"):
        PromptedClasses(face, tokens, length=8)
    with pytest.raises(InputError, match="longer than the context's end, 10, got 9"):
        face.encode_text(tokens, torch.zeros(9, 16))
    with pytest.raises(InputError, match="gallery must be finite, found nan at row 1"):
        ImageQueries(face, torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]))
    with pytest.raises(InputError, match="at least two rows"):
        TextQueries(face, torch.ones(1, 12))
    with pytest.raises(InputError, match="gallery must have the width of the features, 12, got 5"):
        ImageQueries(face, torch.ones(2, 5))(images(1))
    for wrong in (tokens[0], tokens[:1], tokens.float()):
        with pytest.raises(InputError, match=r"tokens must be integers \(c, t\), c >= 2"):
            PromptedClasses(face, wrong)
    with pytest.raises(InputError, match="start must be at least 0"):
        PromptedClasses(face, tokens, start=-1)
