"""One small model of every timm family as the vision tower: built, saved, loaded again, and compared."""

import shutil

import pytest
import timm
import torch
from torch import nn

from modeling_clipmini import ClipMiniConfig, ClipMiniModel
from modeling_clipmini.folding_clipmini import FoldedPair
from modeling_clipmini.processing_clipmini import image_processor_for

# The smallest model of each family (module of timm); a new family has to be added here. Older versions lack some.
NEWEST = """
    beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
    cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121
    dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
    ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18
    legacy_xception levit_128s lowformer_b0 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small pit_ti_224 pnasnet5large
    poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50
    resnest14d resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1
    skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet
    test_resnet test_vit test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
    vgg11 visformer_tiny vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    xception41p xcit_nano_12_p8_224
""".split()
SMALLEST = [name for name in NEWEST if timm.is_model(name)]
DEEP = ("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m")  # whose first two blocks will do

# What cannot be a vision tower, and why; all else must work.
REFUSED = {"coat": "are one weight, and safetensors stores no weight under two names"}
# What can, if its images are prepared otherwise than its authors did; the message is the processor's.
PREPARED_OTHERWISE = {"deepseek_vit": ("crop_mode='border' is not supported; .* to 'center'", {"crop_mode": "center"})}


def family(architecture):
    return timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]


def make_config(architecture, tiny_config):
    values = {"architecture": architecture}
    if architecture in DEEP:
        values["model_args"] = {"depth": 2}
    if family(architecture) in PREPARED_OTHERWISE:
        message, changes = PREPARED_OTHERWISE[family(architecture)]
        with pytest.raises(ValueError, match=message):
            image_processor_for(ClipMiniConfig(vision_config=values).vision_config)
        values["pretrained_cfg"] = {**timm.models.get_pretrained_cfg(architecture).to_dict(), **changes}
    return tiny_config(vision_config=values)


@pytest.mark.skipif(NEWEST != SMALLEST, reason="an older timm, without some of the families")
def test_every_family_is_here():
    assert sorted(map(family, SMALLEST)) == sorted(timm.list_modules())
    assert {*REFUSED, *PREPARED_OTHERWISE} <= set(timm.list_modules())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SMALLEST)
@torch.no_grad()
def test_a_family_works_or_is_refused(architecture, tiny_config, tmp_path):
    torch.manual_seed(0)
    config = make_config(architecture, tiny_config)
    if family(architecture) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family(architecture)]):
            ClipMiniModel(config)
        return
    model = ClipMiniModel(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.25)
    size = image_processor_for(config.vision_config).crop_size
    pixel_values = torch.randn(1, 3, size["height"], size["width"])
    expected = model(pixel_values=pixel_values).image_embeds
    pooled = model.pool_images(pixel_values)
    assert pooled.shape == (1, model.config.vision_embed_dim)
    assert pooled.std() > 0
    assert expected.isfinite().all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldedPair, "is_folded", lambda pair, layer: False)
        apart = model.pool_images(pixel_values)
    assert (apart - pooled).norm() < 1e-3 * pooled.norm()
    model.save_pretrained(tmp_path)
    loaded, info = ClipMiniModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # Weights are mapped from the file, and unaligned memory may get another kernel: compare like with like.
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()
    assert torch.equal(loaded(pixel_values=pixel_values).image_embeds, expected)
    shutil.rmtree(tmp_path)  # two gigabytes in all
