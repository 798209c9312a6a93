"""What driver and workers write to their logs."""

import logging


def configure_logging() -> None:
    """Our own words at INFO; of the libraries only what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for noisy in ("httpx", "botocore", "boto3", "s3transfer", "urllib3", "torch.distributed.checkpoint", "onnx_ir", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
