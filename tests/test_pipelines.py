"""Latent pipelines: their companions are carried, their latents and prompts are made once."""

import json

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
)
from families import model as model_of
from helpers import noise_images, tiny_model
from PIL import Image
from pipelines import autoencoder, latent_diffusion, stable_diffusion, vq_autoencoder
from safetensors.torch import load_file

from prunedm.errors import UserError
from prunedm.folder import hash_folder, load, save
from prunedm.model_files import companions
from prunedm.options import (
    DataOptions,
    EvaluateOptions,
    FinetuneOptions,
    LearnOptions,
    LossOptions,
    PruneOptions,
    SampleOptions,
)
from prunedm.sampling import images_of
from prunedm.stages import evaluate, finetune, learn, loss, prune, sample
from prunedm.stages.inputs import images_for, training_problems
from prunedm.task.codec import Latents
from prunedm.task.condition import Prompts
from prunedm.tensor_cache import TensorCache, content_key

QUICK = {"device": "cpu"}
WORDS = ("a red one", "a blue two", "a green three")


@pytest.fixture
def captioned(tmp_path):
    """A folder of images with a caption each, as `datasets`' imagefolder reads it."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    rows = []
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:02d}.png")
        rows.append({"file_name": f"{k:02d}.png", "text": WORDS[k % 3]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_latents_are_those_of_the_autoencoder_and_come_back_as_images():
    vae = autoencoder()
    codec = Latents(vae, (4, 8, 8), key="test")
    assert codec.image_shape == (3, 16, 16)
    images = torch.stack([noise_images(4, size=16, channels=3)[k] for k in range(4)])
    found = codec.encode(images)
    with torch.no_grad():
        mode = vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(found, (mode - 0.1) * 0.5, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        due = vae.decode(mode).sample
    decoded = codec.decode(found)
    assert decoded.dtype == torch.uint8
    due = ((due.clamp(-1, 1) + 1) * 127.5).round()
    assert (decoded.float() - due).abs().max() <= 1


def test_what_is_encoded_once_is_not_encoded_again():
    codec = Latents(autoencoder(), (4, 8, 8), key="once")
    images = torch.stack([noise_images(4, size=16, channels=3)[k] for k in range(4)])
    first = codec.encode(images)
    codec.autoencoder.encode = None  # would raise
    assert torch.equal(codec.encode(images), first)
    assert torch.equal(codec.encode(images[[2]]), first[[2]])
    with pytest.raises(TypeError):
        codec.encode(255 - images)


def test_an_entry_that_is_damaged_is_made_again():
    cache, key = TensorCache("test", "maker"), content_key(torch.arange(3))
    cache.get(key, lambda: {"x": torch.ones(2)})
    (path,) = cache.folder.rglob("*.safetensors")
    path.write_bytes(b"")
    assert torch.equal(cache.get(key, lambda: {"x": torch.zeros(2)})["x"], torch.zeros(2))
    assert torch.equal(cache.get(key, dict)["x"], torch.zeros(2))


def test_prompts_are_what_the_pipeline_makes_of_them(captioned):
    model = load(stable_diffusion())
    assert isinstance(model.condition, Prompts)
    pipe = StableDiffusionPipeline.from_pretrained(stable_diffusion())
    with torch.no_grad():
        due, _ = pipe.encode_prompt(list(WORDS), "cpu", 1, False)
    found = model.condition.encoder(WORDS)["encoder_hidden_states"]
    torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5)
    options = DataOptions(dataset=str(captioned), **QUICK)
    images = images_for(model, options, "train")
    assert images.captions[:4] == [*WORDS, WORDS[0]]
    batch = training_problems(model, options, images).batch(range(200))
    states = batch.inputs["encoder_hidden_states"]
    empty = model.condition.encoder([""])["encoder_hidden_states"]
    share = float((states == empty).flatten(1).all(1).float().mean())
    assert 0.03 < share < 0.2  # left out with probability 0.1
    for k in range(200):
        assert any(torch.equal(states[k], row) for row in (*found, *empty))
    again = training_problems(model, options, images).batch(range(50, 60))
    assert torch.equal(again.inputs["encoder_hidden_states"], states[50:60])


@pytest.mark.parametrize("folder", [stable_diffusion, latent_diffusion])
def test_companions_are_carried_and_diffusers_loads_the_result(folder, tmp_path):
    model = load(folder())
    model.name = "made"
    save(model, tmp_path / "out")
    index = json.loads((folder() / "model_index.json").read_text())
    own = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert {k: v for k, v in own.items() if k != "_diffusers_version"} == {
        k: v for k, v in index.items() if k not in ("_diffusers_version", "_name_or_path")
    }
    for name in model.companions.names:
        for path in model.companions.files(name):
            copy = tmp_path / "out" / path.relative_to(folder())
            assert copy.read_bytes() == path.read_bytes()
            assert copy.samefile(path)  # not a second copy
    before, after = (
        DiffusionPipeline.from_pretrained(place).unet.state_dict()
        for place in (folder(), tmp_path / "out")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_hash_tells_of_every_component(tmp_path):
    save(load(stable_diffusion()), tmp_path / "out")
    first = hash_folder(tmp_path / "out")
    for path in sorted((tmp_path / "out").rglob("*")):
        if path.is_file() and path.parent != tmp_path / "out":
            content = path.read_bytes()
            path.unlink()  # a link: the original stays
            path.write_bytes(content + b" ")
            assert hash_folder(tmp_path / "out") != first, path
            path.write_bytes(content)
    assert hash_folder(tmp_path / "out") == first


def test_prune_finetune_and_loss_work_on_a_captioned_folder(captioned, tmp_path):
    data = {"dataset": str(captioned), **QUICK}
    options = PruneOptions(
        mechanism="obs-nm", pattern="2:4", calibration_problems=8, pictures=2, **data
    )
    prune(stable_diffusion(), tmp_path / "sparse", options)
    assert (tmp_path / "sparse" / "vis" / "after_pruning.png").exists()
    tuning = FinetuneOptions(steps=2, batch_size=4, validation_problems=4, **data)
    finetune(tmp_path / "sparse", tmp_path / "tuned", tuning)
    found, _ = loss(tmp_path / "tuned", tmp_path / "loss", LossOptions(problems=8, **data))
    assert np.isfinite(found.figures["loss"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "tuned")
    model = load(tmp_path / "tuned")
    zeros = sum(int((~mask).sum()) for _, mask in model.masks)
    weights = [pipe.unet.get_submodule(n).weight for n, _ in model.masks]
    assert sum(int((w == 0).sum()) for w in weights) >= zeros
    images = images_of(model, 2, 2)
    assert images.shape == (2, 16, 16, 3)


def test_an_unconditional_latent_model_goes_through(tmp_path):
    data = {"dataset": "digits", "convert_channels": True, **QUICK}
    options = PruneOptions(target="params=0.2", score="magnitude", pictures=2, **data)
    prune(latent_diffusion(), tmp_path / "narrow", options)
    model = load(tmp_path / "narrow")
    assert type(model.denoiser).__name__ == "PrunedUNet2DModel"
    assert images_of(model, 2, 2).shape == (2, 16, 16, 3)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "narrow")
    assert pipe.unet.config.widths


def test_images_without_captions_say_what_gives_them(tmp_path, captioned):
    (captioned / "metadata.jsonl").unlink()
    model = load(stable_diffusion())
    with pytest.raises(UserError, match=r"has no captions.*metadata\.jsonl.*--caption-column"):
        images_for(model, DataOptions(dataset=str(captioned), **QUICK), "train")


def test_an_image_without_a_caption_is_named(captioned):
    lines = (captioned / "metadata.jsonl").read_text().splitlines()
    (captioned / "metadata.jsonl").write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=r"22\.png has no caption; 2 images have none"):
        images_for(load(stable_diffusion()), DataOptions(dataset=str(captioned), **QUICK), "train")


def test_a_column_of_captions_may_have_any_name(captioned):
    path = captioned / "metadata.jsonl"
    path.write_text(path.read_text().replace('"text"', '"what is seen"'))
    options = DataOptions(dataset=str(captioned), caption_column="what is seen", **QUICK)
    assert images_for(load(stable_diffusion()), options, "train").captions[0] == WORDS[0]
    options = options.model_copy(update={"caption_column": "what is sean"})
    with pytest.raises(UserError, match="no column 'what is sean'; did you mean 'what is seen'"):
        images_for(load(stable_diffusion()), options, "train")


# ------------------------------------------------------- networks that cannot be asked here


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SD3Transformer2DModel", "no text encoders beside it.*--score magnitude"),
        ("LlamaForCausalLM", "is a language model and reads texts; give --dataset"),
    ],
)
def test_masks_that_ask_nothing_are_made_where_nothing_can_be_asked(name, why, tmp_path):
    folder = tmp_path / "bare"
    save(model_of(name), folder)
    options = PruneOptions(mechanism="nm", pattern="2:4", score="magnitude", **QUICK)
    record, _ = prune(folder, tmp_path / "sparse", options)
    masks = load(tmp_path / "sparse").masks
    assert masks.kept * 2 == masks.total > 0
    assert "loss" not in record.figures
    asking = options.model_copy(update={"score": "wanda"})
    with pytest.raises(UserError, match=why):
        prune(folder, tmp_path / "asked", asking)


def test_a_class_without_a_record_takes_masks_that_ask_nothing(tmp_path):
    made = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    made.save_pretrained(tmp_path / "pixart")
    options = PruneOptions(mechanism="nm", pattern="2:4", score="magnitude", **QUICK)
    prune(tmp_path / "pixart", tmp_path / "sparse", options)
    again = load(tmp_path / "sparse")
    assert isinstance(again.denoiser, PixArtTransformer2DModel)
    assert again.masks.kept * 2 == again.masks.total
    with pytest.raises(UserError, match="how to call a PixArtTransformer2DModel is not known"):
        loss(tmp_path / "pixart", tmp_path / "loss", LossOptions(**QUICK))


# ------------------------------------------------------------------------ types, hashes, sizes


def test_weights_keep_the_types_of_their_file(tmp_path):
    network = model_of("SD3Transformer2DModel").denoiser.to(torch.bfloat16)
    network.pos_embed.proj.to(torch.float32)
    network.save_pretrained(tmp_path / "mixed")
    model = load(tmp_path / "mixed")
    assert model.dtype == torch.bfloat16
    assert model.other_dtypes.keys() == {"pos_embed.proj.weight", "pos_embed.proj.bias"}
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}  # it is small
    save(model, tmp_path / "again")
    (before,), (after,) = (
        [load_file(path) for path in place.rglob("*.safetensors")]
        for place in (tmp_path / "mixed", tmp_path / "again")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])


def test_a_large_network_is_not_widened_in_memory(tmp_path, monkeypatch):
    network = model_of("SD3Transformer2DModel").denoiser.to(torch.bfloat16)
    network.save_pretrained(tmp_path / "large")
    for place in ("folder", "model_files.weights"):
        monkeypatch.setattr(f"prunedm.{place}.LARGE", 1)
    model = load(tmp_path / "large")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    save(model, tmp_path / "again")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    (path,) = (tmp_path / "again").rglob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def test_large_files_are_hashed_once_and_again_when_they_change(tmp_path, monkeypatch):
    save(model_of("UNet2DModel"), tmp_path / "m")
    plain = hash_folder(tmp_path / "m")
    monkeypatch.setattr(companions, "REMEMBERED", 0)
    read = []
    chunks = companions._chunks
    monkeypatch.setattr(companions, "_chunks", lambda path: read.append(path) or chunks(path))
    assert hash_folder(tmp_path / "m") == plain
    count = len(read)
    assert count > 0
    assert hash_folder(tmp_path / "m") == plain
    assert len(read) == count  # nothing was read again
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(config.read_text().replace("8", "9", 1))  # of the same size
    assert hash_folder(tmp_path / "m") != plain


def tiny_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    )


@pytest.mark.parametrize("make", [autoencoder, tiny_autoencoder, vq_autoencoder])
def test_every_kind_of_autoencoder_goes_there_and_back(make):
    vae = make().eval()
    channels = vae.config.latent_channels
    codec = Latents(vae, (channels, 8, 8), key=make.__name__)
    assert codec.image_shape == (3, 16, 16)
    images = torch.stack([noise_images(2, size=16, channels=3)[k] for k in range(2)])
    clean = codec.encode(images)
    assert clean.shape == (2, channels, 8, 8)
    assert clean.dtype == torch.float32
    decoded = codec.decode(clean)
    assert decoded.shape == (2, 3, 16, 16)
    with torch.no_grad():
        ranged = images.float() / 127.5 - 1
        found = vae.encode(ranged)
        z = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        due = ((vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round()
    assert (decoded.float() - due).abs().max() <= 1


def test_captions_come_from_a_table_too(tmp_path):
    table = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(np.full((16, 16, 3), k, np.uint8)) for k in range(24)],
            "caption": [[WORDS[k % 3], "another"] for k in range(24)],
        },
        features=datasets.Features(
            image=datasets.Image(), caption=datasets.List(datasets.Value("string"))
        ),
    )
    table.to_parquet(str(tmp_path / "set.parquet"))
    options = DataOptions(dataset=str(tmp_path / "set.parquet"), **QUICK)
    images = images_for(load(stable_diffusion()), options, "train")
    assert images.captions[:3] == list(WORDS)  # of several the first


def test_images_need_not_be_square(tmp_path):
    wide = tiny_model(sample_size=(8, 16), in_channels=3, out_channels=3)
    save(wide, tmp_path / "wide")
    (tmp_path / "images").mkdir()
    for k in range(24):  # red on the left, blue on the right, white bars above and below
        array = np.full((40, 40, 3), 255, np.uint8)
        array[10:30, :20], array[10:30, 20:] = (255, 0, 0), (0, 0, 255)
        Image.fromarray(array).save(tmp_path / "images" / f"{k}.png")
    data = {"dataset": str(tmp_path / "images"), **QUICK}
    image = images_for(wide, DataOptions(**data), "train")[0]
    assert image.shape == (3, 8, 16)
    assert image[:, 4, 1].tolist() == [255, 0, 0]
    assert image[:, 4, 14].tolist() == [0, 0, 255]
    assert image[1, 0].float().mean() < 30  # white is outside of the middle part
    options = PruneOptions(target="params=0.2", score="magnitude", pictures=2, **data)
    prune(tmp_path / "wide", tmp_path / "narrow", options)
    assert images_of(load(tmp_path / "narrow"), 2, 2).shape == (2, 8, 16, 3)


@pytest.mark.parametrize("folder", [stable_diffusion, latent_diffusion])
def test_evaluate_sample_and_learn_work_on_latent_pipelines(folder, captioned, tmp_path):
    data = {"dataset": str(captioned), **QUICK}
    options = PruneOptions(mechanism="nm", score="magnitude", pictures=0, problems=0, **data)
    prune(folder(), tmp_path / "sparse", options)
    quick = LearnOptions(steps=2, batch_size=4, validation_problems=4, dataset_size=0, **data)
    learn(tmp_path / "sparse", tmp_path / "learned", quick)
    measured = EvaluateOptions(
        problems=4, samples=2, sampling_steps=2, skip_fid=True, latency_batch=1, latency_repeats=1,
        latency_batches=(1,), **data,
    )  # fmt: skip
    evaluate(tmp_path / "learned", tmp_path / "evaluated", measured)
    found = json.loads((tmp_path / "evaluated" / "evaluation_results.json").read_text())
    assert '"failed": {}' in json.dumps(found), json.dumps(found)[:2000]
    sample(
        tmp_path / "learned",
        tmp_path / "drawn",
        SampleOptions(count=3, sampling_steps=2, device="cpu"),
    )
    assert len(list((tmp_path / "drawn").glob("0*.png"))) == 3
