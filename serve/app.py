"""graft on Ray Serve: `serve run serve.app:build model=FOLDER`, or `serve deploy serve/serve.yaml`."""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from serve.api import transcription_api
from serve.schema import ServeArgs


class TranscriptionService:
    """A replica: one model, one engine, and the HTTP API over them. All its requests share the engine's batches."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        from graft.transcriber import load

        torch.set_num_threads(args.threads)
        self.args = args
        self.transcriber = load(args.model, device="cuda" if args.gpus_per_replica else "cpu", dtype=args.dtype)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return transcription_api(
            self.transcriber,
            name=self.args.name or self.transcriber.name,
            max_upload_bytes=self.args.max_upload_bytes,
            max_duration_s=self.args.max_duration_s,
        )


def build(args: ServeArgs) -> Application:
    """Make the application. Raises ModelError for what is no graft before a replica starts."""
    from graft.model.build import check_kind
    from graft.model.opening import base_graft

    check_kind(base_graft(args.model), "graft")
    if os.path.exists(args.model):  # replicas have another working directory
        args = args.model_copy(update={"model": os.path.abspath(args.model)})
    deployment = serve.deployment(
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1, args.max_ongoing_requests // 2),
        },
        ray_actor_options={"num_cpus": args.threads, "num_gpus": args.gpus_per_replica},
        graceful_shutdown_timeout_s=60,
    )
    return deployment(serve.ingress()(TranscriptionService)).bind(args)
