"""A ROS 2 node: images in, their saliency out as images, always of the newest frame.

    python -m facetrt.engine.examples.ros2_node --bundle builtin --ros-args -r image:=/camera/image_raw

It subscribes to ``image`` (sensor_msgs/Image: rgb8, bgr8, rgba8, bgra8 or mono8) and publishes ``saliency`` (mono8, one
pixel per cell) with the header of the frame it belongs to. rclpy comes with ROS 2 and is needed by ``main`` alone.
"""

from __future__ import annotations

import argparse
import array
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from facetrt.engine import Engine, Features
from facetrt.engine.images.loading import Pixels
from facetrt.engine.video.stream import Stream, StreamResult
from facetrt.kernels.errors import FacetrtError, InputError, MissingDependencyError, SourceError

CHANNELS = {"rgb8": (0, 1, 2), "bgr8": (2, 1, 0), "rgba8": (0, 1, 2), "bgra8": (2, 1, 0), "mono8": (0, 0, 0)}
BYTES = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}  # of a pixel


class Stamp(Protocol):
    """builtin_interfaces/Time."""

    sec: int
    nanosec: int


class ImageMessage(Protocol):
    """What is used of sensor_msgs/Image: ``height`` rows of ``step`` bytes, which begin with ``width`` pixels."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any


def to_pixels(message: ImageMessage) -> Pixels:
    """``(height, width, 3)`` uint8 RGB of an image message; padding at the end of rows and alpha are left out.

    Raises:
        InputError: another encoding, or fewer bytes than the message says.
    """
    encoding, height, width = message.encoding.lower(), message.height, message.width
    if encoding not in CHANNELS:
        raise InputError(f"encoding {message.encoding!r}: expected {', '.join(CHANNELS)}")
    used = width * BYTES[encoding]
    data = np.frombuffer(message.data, np.uint8)
    if not used or not height or message.step < used or data.size < message.step * height:
        raise InputError(
            f"{data.size} bytes in rows of {message.step} for {width}×{height} pixels of {encoding}: expected {height} "
            f"rows of at least {used} bytes"
        )
    rows = data[: message.step * height].reshape(height, message.step)[:, :used]
    return np.ascontiguousarray(rows.reshape(height, width, BYTES[encoding])[..., CHANNELS[encoding]])


def fill_message(message: Any, pixels: NDArray[np.uint8]) -> Any:
    """Write ``(H, W)`` as mono8, or ``(H, W, 3)`` RGB as rgb8, into an image message; returns it."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise InputError(
            f"an array of shape {pixels.shape} and type {pixels.dtype}: expected (H, W) or (H, W, 3) uint8"
        )
    message.height, message.width = pixels.shape[:2]
    message.encoding = "mono8" if pixels.ndim == 2 else "rgb8"
    message.step = pixels[0].size
    message.is_bigendian = 0
    message.data = array.array("B", pixels.tobytes())  # the type that rclpy takes without looking at each byte
    return message


def seconds_of(stamp: Stamp) -> float:
    """Seconds of a builtin_interfaces/Time; at today's times exact to a microsecond."""
    return stamp.sec + stamp.nanosec * 1e-9


def fill_stamp(stamp: Stamp, seconds: float) -> None:
    """The inverse of :func:`seconds_of`."""
    stamp.sec, stamp.nanosec = divmod(round(seconds * 1e9), 10**9)


def saliency_pixels(result: StreamResult[Features]) -> NDArray[np.uint8]:
    """``(grid_h, grid_w)``, 255 where the frame is most salient."""
    return np.rint(result.features.saliency * 255).astype(np.uint8)


def receive(stream: Stream[Features], message: Any, warn: Callable[[str], object]) -> None:
    """Hand over what a camera published; what cannot be used is told of and left out."""
    try:
        stream.put(to_pixels(message), seconds_of(message.header.stamp))
    except InputError as error:
        warn(str(error))


def serve(
    stream: Stream[Features],
    publish: Callable[[StreamResult[Features]], object],
    stop: threading.Event,
    warn: Callable[[str], object],
) -> None:
    """Publish every result until ``stop`` is set and the stream closed; a camera that pauses is waited for."""
    while not stop.is_set():
        try:
            for result in stream:
                publish(result)
        except (InputError, SourceError) as error:  # this frame, or none for a while
            warn(str(error))
        if not stop.is_set():
            stream.restart()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and spin until the node is shut down."""
    try:
        import rclpy
        from sensor_msgs.msg import Image
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}: rclpy and sensor_msgs come with ROS 2 and not from PyPI: source its setup script first"
        ) from error
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--load-size", type=int, default=224)
    given, ros_arguments = parser.parse_known_args(arguments)
    with Engine.open(given.bundle) as engine, engine.stream(load_size=given.load_size) as stream:
        rclpy.init(args=ros_arguments)
        node = rclpy.create_node("facetrt")
        try:
            _spin(rclpy, node, Image, stream)
        finally:
            node.destroy_node()
            rclpy.try_shutdown()


def _spin(rclpy: Any, node: Any, image_type: Any, stream: Stream[Features]) -> None:
    """Frames come in on this thread, results go out on another."""
    publisher = node.create_publisher(image_type, "saliency", 1)
    warn, stop, camera = node.get_logger().warning, threading.Event(), {"frame_id": ""}

    def on_image(message: Any) -> None:
        camera["frame_id"] = message.header.frame_id
        receive(stream, message, warn)

    def publish(result: StreamResult[Features]) -> None:
        message = fill_message(image_type(), saliency_pixels(result))
        message.header.frame_id = camera["frame_id"]
        fill_stamp(message.header.stamp, result.frame.timestamp)
        publisher.publish(message)

    node.create_subscription(image_type, "image", on_image, 1)
    worker = threading.Thread(target=serve, args=(stream, publish, stop, warn))
    worker.start()
    try:
        rclpy.spin(node)
    finally:
        stop.set()
        stream.close()
        worker.join()


if __name__ == "__main__":
    try:
        main()
    except FacetrtError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
