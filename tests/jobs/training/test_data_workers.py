"""Test how many loaders are chosen: enough for the devices, and no more than the cluster has CPUs for."""

import pytest

from graft.data.settings import AugmentRecipe
from jobs.training.data_workers import DataWorkers, choose_data_workers, fit_cluster, gpu_name

FLOPS_PER_AUDIO_S = 1.0e12
"""Of stage 1 of a 7B graft: an H200 at half its peak takes 395 s of audio a second."""


@pytest.mark.parametrize(
    ("device", "workers", "augment", "count"),
    [
        ("H200", 1, None, 1),
        ("H200", 8, None, 6),
        ("H200", 8, AugmentRecipe(), 19),
        ("A100", 8, None, 3),
        ("", 8, None, 6),
        (None, 8, AugmentRecipe(), 2),
    ],
)
def test_loaders_suffice_for_the_devices(
    device: str | None, workers: int, augment: AugmentRecipe | None, count: int
) -> None:
    chosen = choose_data_workers(flops_per_audio_s=FLOPS_PER_AUDIO_S, workers=workers, device=device, augment=augment)
    assert chosen.count == count
    if device is not None:
        assert chosen.reason.startswith(f"{workers} x {device or 'unknown GPU, as fast as an h200,'} take ")


def test_no_more_loaders_are_chosen_than_fit_beside_the_workers() -> None:
    wanted = DataWorkers(20, "8 x H200 take much")

    def fit(resource: str | None = None, **resources: float) -> DataWorkers:
        return fit_cluster(wanted, resources, workers=8, gpu=True, resource=resource)

    assert fit(GPU=8, CPU=96) == fit(GPU=1, CPU=4) == wanted  # The second cluster is still growing.
    assert fit(GPU=8, CPU=16) == DataWorkers(8, "for which the cluster has room; 20 are wanted, as 8 x H200 take much")
    assert fit(GPU=8, CPU=96, resource="loading", loading=3).count == 3
    assert fit(GPU=8, CPU=8).count == 1


def test_the_clusters_gpus_are_known_by_rays_names() -> None:
    assert gpu_name({"CPU": 8.0, "accelerator_type:H200": 1.0}) == "H200"
    assert gpu_name({"accelerator_type:Intel-GPU": 1.0, "accelerator_type:A100": 1.0}) == "A100"
    assert gpu_name({"CPU": 8.0}) == ""
