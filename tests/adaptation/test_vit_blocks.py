import pytest
import torch
import vision_towers
from torch import nn
from toynet import ToyNet, built
from vision_towers import class_features, every_model, images

from trimtab.adaptation.vit_blocks import TowerClassifier, attention, take_apart
from trimtab.core.checks import InputError


@every_model
def test_the_parts_compute_what_the_model_computes(make):
    model, x = make(), images(3)
    with torch.no_grad():
        expected = (
            model.encode_image(x) if hasattr(model, "encode_image") else model.get_image_features(x).pooler_output
        )
        parts = take_apart(model)
        torch.testing.assert_close(parts(x), expected)
    assert len(parts.blocks) == vision_towers.DEPTH
    assert parts.embed(x).shape[2] == parts.width


def test_a_tower_alone():
    tower, x = vision_towers.transformers_tower(), images(2)
    with torch.no_grad():
        features = tower(x).pooler_output
        torch.testing.assert_close(take_apart(tower)(x), features)
        said = TowerClassifier(tower, class_features(), logit_scale=7.0)(x)
        torch.testing.assert_close(said, 7 * torch.cosine_similarity(features[:, None], class_features(), dim=2))


@pytest.mark.vision
@pytest.mark.parametrize("settings", [{"global_pool": "token"}, {"global_pool": "map", "class_token": False}])
def test_timm_alone(settings):
    import timm

    model = built(lambda: timm.create_model("test_vit", img_size=96, num_classes=5, init_values=0.5, **settings))
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(take_apart(model)(x), model(x))


def test_a_row_of_the_attention_map():
    generator = torch.Generator().manual_seed(0)
    layer = built(lambda: nn.MultiheadAttention(16, 4, batch_first=True))
    tokens = torch.randn(2, 7, 16, generator=generator)
    with torch.no_grad():
        expected = layer(tokens, tokens, tokens, average_attn_weights=False)[1][:, :, 3]
        q, k, _ = nn.functional.linear(tokens, layer.in_proj_weight, layer.in_proj_bias).chunk(3, 2)
        q, k = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in (q, k))
        torch.testing.assert_close(attention(q[:, :, 3], k), expected)


def test_the_probe_weighs_as_the_pooling_does():
    model = vision_towers.transformers_siglip()
    tower, parts = model.vision_model, take_apart(model)
    pool = tower.head
    with torch.no_grad():
        nn.init.normal_(pool.attention.in_proj_bias, generator=torch.Generator().manual_seed(0))
        parts = take_apart(model)
        tokens = parts.blocks[0](parts.embed(images(2)))
        normed = tower.post_layernorm(tokens)
        _, expected = pool.attention(pool.probe.expand(2, -1, -1), normed, normed, average_attn_weights=False)
        torch.testing.assert_close(parts.probe(tokens), expected[:, :, 0])
        torch.testing.assert_close(parts.summary(tokens), (expected.mean(1) @ tokens)[:, 0])


@pytest.mark.vision
def test_the_probe_weighs_as_timm_s_pooling_does():
    model = vision_towers.open_clip_siglip()
    trunk, parts = model.visual.trunk, take_apart(model)
    with torch.no_grad():
        tokens = parts.embed(images(2))
        pool, normed = trunk.attn_pool, trunk.norm(tokens)
        keys = pool.kv(normed).chunk(2, 2)[0].unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
        query = pool.q(pool.latent).unflatten(2, (pool.num_heads, -1)).transpose(1, 2)
        expected = attention(query[:, :, 0].expand(2, -1, -1), keys)
        torch.testing.assert_close(parts.probe(tokens), expected)


@pytest.mark.bad_input
def test_what_is_not_a_known_tower_is_refused():
    with pytest.raises(InputError, match=r"vision transformer of transformers .* or timm, found ToyNet"):
        take_apart(built(ToyNet))
    headless = vision_towers.transformers_siglip()
    del headless.vision_model.head
    with pytest.raises(InputError, match="a class token or by attention, this vision tower does neither"):
        take_apart(headless)


@pytest.mark.bad_input
def test_other_towers_of_transformers_are_refused():
    from transformers import BlipVisionConfig, BlipVisionModel, Siglip2VisionConfig, Siglip2VisionModel

    sizes = {**vision_towers.SMALL, "num_hidden_layers": 1, "patch_size": 16}
    blip = built(lambda: BlipVisionModel(BlipVisionConfig(image_size=32, **sizes)))
    with pytest.raises(InputError, match="plain self-attention, found BlipAttention"):
        take_apart(blip)
    siglip2 = built(lambda: Siglip2VisionModel(Siglip2VisionConfig(num_patches=4, **sizes)))
    with pytest.raises(InputError, match="cut images into patches itself, Siglip2VisionModel takes patches"):
        take_apart(siglip2)


@pytest.mark.bad_input
@pytest.mark.vision
def test_blocks_of_other_kinds_in_timm_s_place_are_refused():
    from timm.models.beit import Beit
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    post = built(lambda: VisionTransformer(block_fn=ResPostBlock, **sizes))
    beit = built(lambda: Beit(**sizes))
    for model in (post, beit):
        with pytest.raises(InputError, match="pre-LN blocks with plain self-attention, found"):
            take_apart(model)


@pytest.mark.bad_input
def test_a_classifier_of_one_class_or_without_scale_is_refused():
    tower = vision_towers.transformers_tower()
    with pytest.raises(InputError, match="class_features must have at least two rows, got 1"):
        TowerClassifier(tower, class_features()[:1])
    with pytest.raises(InputError, match="logit_scale must lie in"):
        TowerClassifier(tower, class_features(), logit_scale=0.0)


@pytest.mark.bad_input
@pytest.mark.vision
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qk_norm": True}, "plain self-attention, found Block"),
        ({"global_pool": "avg"}, "pools by 'avg'"),
        ({"reg_tokens": 2}, "3 prefix tokens"),
    ],
)
def test_other_timm_models_are_refused(settings, message):
    import timm

    model = built(lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, **settings))
    with pytest.raises(InputError, match=message):
        take_apart(model)


@pytest.mark.bad_input
@pytest.mark.vision
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_type": "avg"}, "features from the class token"),
        ({"attentional_pool": True}, "features from the class token"),
        ({"qk_norm": True}, "plain self-attention, found CustomResidualAttentionBlock"),
    ],
)
def test_other_open_clip_models_are_refused(settings, message):
    from open_clip.transformer import VisionTransformer

    tower = built(lambda: VisionTransformer(32, 16, 16, 1, 2, 2.0, output_dim=8, **settings))
    with pytest.raises(InputError, match=message):
        take_apart(tower)
