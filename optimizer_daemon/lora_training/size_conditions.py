"""What SDXL is told about a picture's size and crop, in sd-scripts' meaning.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.2; numbers as sd-scripts' BucketManager.get_crop_ltrb has them.
"""

from __future__ import annotations

from optimizer_daemon.lora_training.buckets import Size

TimeIds = tuple[int, int, int, int, int, int]
"""Original height and width, crop top and left, target height and width; pixels."""


def time_ids(original: Size, bucket: Size, *, flipped: bool) -> TimeIds:
    """Return what the UNet is told of one draw.

    The crop is not the place where the picture was cut: sd-scripts takes the picture as if it had been fitted into the
    bucket and counts the border beside it, half of it on each side; mirrored, left is counted from the other side.

    Args:
        original: size of the file's picture, before it was resized.
        bucket: the size it is trained at.
        flipped: it is mirrored.
    """
    (width, height), (bucket_width, bucket_height) = original, bucket
    aspect = width / height
    if bucket_width / bucket_height > aspect:
        fitted_width, fitted_height = bucket_height * aspect, float(bucket_height)
    else:
        fitted_width, fitted_height = float(bucket_width), bucket_width / aspect
    left, top = (bucket_width - fitted_width) // 2, (bucket_height - fitted_height) // 2
    if flipped:
        left = bucket_width - (left + fitted_width)
    return (height, width, int(top), int(left), bucket_height, bucket_width)
