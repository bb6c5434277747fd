"""Makes the bucket that `STORAGE_URL` names, once the S3 server answers; does nothing where it is there already."""

from __future__ import annotations

import sys
import time
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from app.settings import load_settings

GIVE_UP_AFTER_S = 60.0


def main() -> None:
    """Exit status 0 where the bucket is there, else 1 and the reason."""
    settings = load_settings().storage
    url = urlsplit(settings.url)
    if url.scheme != "s3" or not url.netloc:
        sys.exit(f"STORAGE_URL is {settings.url!r}, not s3://bucket")
    secret = settings.s3_secret_access_key
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}, connect_timeout=5, read_timeout=10),
    )
    deadline = time.monotonic() + GIVE_UP_AFTER_S
    while True:
        try:
            if url.netloc not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=url.netloc)
            sys.stdout.write(f"bucket {url.netloc} is there\n")
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"bucket {url.netloc}: {error}")
            time.sleep(1)


if __name__ == "__main__":
    main()
