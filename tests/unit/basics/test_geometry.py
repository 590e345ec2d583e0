"""Video frames, latent frames and sides."""

import pytest

from kairos_train.basics.geometry import latent_frames, latent_sides, video_frames, whole_frames


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3), (81, 21)])
def test_the_first_frame_stands_alone_and_then_four_are_one(frames, latents):
    assert latent_frames(frames) == latents
    assert video_frames(latents) == frames


def test_a_clip_of_any_length_is_cut_down_to_4k_plus_1():
    assert [whole_frames(n) for n in range(1, 11)] == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]


def test_latents_have_an_eighth_of_the_sides():
    assert latent_sides(256, 480) == (32, 60)
