"""The engine: one opened bundle, and the tasks on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import closing, contextmanager
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast, overload

import numpy as np

from facetrt.engine.backends.choice import make_backend
from facetrt.engine.backends.cuda import CudaBackend
from facetrt.engine.backends.run_options import Kernels, RunOptions
from facetrt.engine.bundle.bundle import Bundle
from facetrt.engine.bundle.manifest import SEGMENTER, Manifest
from facetrt.engine.encoding.encoder import EncodeOptions, Encoder, OnBroken, Progress, Tally
from facetrt.engine.encoding.extraction import extract_features
from facetrt.engine.encoding.frame_encoder import FrameEncoder, HostFrameEncoder
from facetrt.engine.features.collection import MEMORY_LIMIT, FeatureCollection, LazySequence
from facetrt.engine.features.features import Features, ImageRecord, SaliencyMode
from facetrt.engine.features.on_device import DeviceFeatures
from facetrt.engine.features.store import FeatureStore
from facetrt.engine.images.fitting import Fit
from facetrt.engine.images.loading import DEFAULT_SIZE, DefaultSize, ImageLike, LoadSize, Pixels, load_image
from facetrt.engine.machine.memory import MAX_CELLS
from facetrt.engine.settings import parse
from facetrt.engine.tasks.augmentation import augment
from facetrt.engine.tasks.clustering import ClusteringMethod
from facetrt.engine.tasks.cosegmentation import VOTING, CosegmentOptions, Mask, Masks, cosegment_images
from facetrt.engine.tasks.discovery.catalogue import make_method
from facetrt.engine.tasks.discovery.discovering import Discovery
from facetrt.engine.tasks.discovery.fusing import parse_terms
from facetrt.engine.tasks.discovery.method import Method
from facetrt.engine.tasks.discovery.objects import Objects
from facetrt.engine.tasks.discovery.segmenter import Segmenter
from facetrt.engine.tasks.matching import Matches, MatchOptions, match_pair
from facetrt.engine.tasks.models import PartsModel, SegmentationModel
from facetrt.engine.tasks.parts import PartMap, Parts, PartsOptions, segment_parts_features
from facetrt.engine.tasks.refinement import Refinement, check_available
from facetrt.engine.tasks.running import HostRunner, Runner, collect
from facetrt.engine.tasks.smoothing import Smoother
from facetrt.engine.video.comparing import Comparer
from facetrt.engine.video.propagation import MaskPropagator, Memory, PropagateOptions
from facetrt.engine.video.stream import Policy, Stream, StreamOptions
from facetrt.engine.video.tracking import Tracker, TrackOptions
from facetrt.kernels.errors import InputError

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")
MIXED = "images and features were given together: encode all images first, or none"
Images = Iterable[ImageLike] | Iterable[Features] | LazySequence[Features]  # collections and stores are lazy


class Engine:
    """Dense descriptors, correspondence and co-segmentation from one bundle.

    Open with :meth:`open`, close with ``with`` or :meth:`close`. Several engines can live in one process, and one
    engine may be called from several threads.

    Images are paths, PIL images, ``(height, width, 3)`` uint8 RGB arrays or CPU tensors, or image files as bytes or
    file objects. Arrays must be RGB: a program cannot tell BGR, which OpenCV reads, from it. ``load_size`` is the
    length of the shorter side (the longer one follows, truncated; 224 by default), a pair ``(height, width)``, or None
    for the size as it is. Features were loaded before: a load size given with them, and nothing else to load, is an
    error.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._runner = choose_runner(encoder)

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        hint: str = "latency",
        threads: int | None = None,
        cache: str | Path | None = None,
        streams: int = 1,
        kernels: str = "auto",
        allow_inexact: bool = False,
        max_cells: int | None = MAX_CELLS,
        specialisation: str = "auto",
    ) -> Self:
        """Open a bundle folder, or the small model that ships with facetrt under the name ``builtin``.

        ``auto`` is resolved here, once, and recorded in every result. The encoder is loaded by the first call.

        Args:
            device: ``cpu``, ``cuda``, or ``auto``: the CPU, unless the backend runs on GPUs only.
            backend: ``onnxruntime``, ``openvino``, ``tensorrt``, ``tensorrt-rtx``, or ``auto``. On a CPU that is
                OpenVINO for bf16, for throughput, or where it alone is installed, and otherwise ONNX Runtime; on a GPU
                it is TensorRT, or else TensorRT for RTX, if the bundle has a plan for the GPU, and otherwise ONNX
                Runtime.
            precision: ``auto`` (the bundle's own), ``fp32``, ``fp16``, ``bf16`` (OpenVINO, on processors that have it),
                or ``fastest``: bf16 where that is possible, keeps its contract and is faster, else its own.
            hint: ``latency``, or ``throughput``: batches side by side (OpenVINO).
            threads: of the processor; None for all cores.
            cache: a folder for compiled encoders, which makes opening faster the next time; only for backends that
                compile (OpenVINO; TensorRT for RTX, which takes ``BUNDLE.cache`` beside the bundle if none is given).
            streams: of a GPU: so many calls, or batches of one call, overlap.
            kernels: where ``match`` and ``cosegment`` do what follows the encoder: ``host``, ``device``, or ``auto``:
                beside the encoder. On a GPU that takes a bundle with kernels for it (``facetrt export … --kernels``).
            allow_inexact: run a precision although its contract does not hold with this bundle, or was not measured.
            max_cells: an image of more is refused, before it is encoded, with the load size that would do: time grows
                with their square. None for no bound.
            specialisation: when OpenVINO and TensorRT for RTX compile for the very shapes of a batch: ``eager``, before
                the first such batch; ``lazy``, when that has paid, after which results may change in their last bits;
                ``none``; or ``auto``. With OpenVINO ``eager`` pays for streams and for collections of one size: 0.3 to
                0.6 s and 110 MB for each of the last four sizes (ViT-S), and 3 to 7 % less time per image. ``auto`` is
                ``eager`` with TensorRT for RTX, and with OpenVINO in bf16 for images of 8,193 to 16,384 tokens, where
                it saves more than compiling takes; ``lazy`` does not wait there either.

        Raises:
            MissingFileError, BundleError: no bundle there, or a damaged one.
            InputError: a choice that does not exist, or that this bundle or processor does not have; a precision that
                misses its contract.
            MissingDependencyError: the backend's library is not installed.
        """
        options = RunOptions.parse(
            backend=backend,
            device=device,
            precision=precision,
            hint=hint,
            threads=threads,
            cache=cache,
            streams=streams,
            kernels=kernels,
            allow_inexact=allow_inexact,
            specialisation=specialisation,
            max_cells=max_cells,
        )
        opened = Bundle.open(bundle)
        return cls(Encoder(opened, make_backend(opened, options), max_cells=options.max_cells))

    @property
    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return self._encoder.manifest

    @property
    def backend(self) -> str:
        """Name of the backend that runs the encoder."""
        return self._encoder.backend.name

    @property
    def device(self) -> str:
        """Where the encoder runs: ``cpu`` or ``cuda``."""
        return self._encoder.backend.options.device

    @property
    def precision(self) -> str:
        """Precision that the encoder runs in."""
        return self._encoder.backend.options.precision

    @property
    def kernels(self) -> str:
        """Where what follows the encoder runs: on the ``host``, or on the ``device`` beside it."""
        return Kernels.HOST if _on_device(self._encoder) is None else Kernels.DEVICE

    def encode(
        self,
        images: Iterable[ImageLike],
        *,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        fit: str = Fit.NONE,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> list[Features]:
        """Features of each image, in order; images of one shape are run together.

        The last bits of an image's features may depend on the backend, its threads and what else is in the batch. From
        the features on, tasks give the same bits on any number of threads, wherever the features lie.

        Args:
            saliency: ``full`` from the same pass, or ``low_resolution`` from a second one at half size, stride 8.
            stride: between cells, a multiple of the bundle's own that divides the patch size; the bundle's own if None.
            fit: how images are fitted to whole patches: ``none``, ``crop``, ``pad``, ``pad_black`` or ``resize``; see
                :class:`facetrt.engine.images.fitting.Fit`.
            progress: called with (images done, images in all).
            on_broken: called with an image that cannot be encoded and the error; it is left out. None raises.

        Raises:
            InputError, MissingFileError: an image that cannot be read, does not fit the bundle or the memory, or has
                more cells than the engine's ``max_cells``.
        """
        return list(
            self.encode_iter(
                images,
                load_size=load_size,
                saliency=saliency,
                stride=stride,
                fit=fit,
                progress=progress,
                on_broken=on_broken,
            )
        )

    def encode_iter(
        self,
        images: Iterable[ImageLike],
        *,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        fit: str = Fit.NONE,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> Iterator[Features]:
        """Like :meth:`encode`, but yields; only a window of images is held at a time.

        Files are decoded by a thread while the encoder works. An error comes after the features of everything before.
        """
        options = EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"), stride, parse(Fit, fit, "fit"))
        return self._encoder.encode(_as_images(images), options, progress, on_broken)

    def stream(
        self,
        source: Any = None,
        *,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        fit: str = Fit.NONE,
        policy: str = Policy.AUTO,
        latency_budget: float | None = None,
        stall_timeout: float = 10.0,
    ) -> Stream[Features]:
        """Frames in, their features out, in order, for hours: use it in a ``with`` block and iterate.

        Args:
            source: what :func:`open_source` takes: a video file, a folder of images, the number of a camera, an
                ``rtsp://`` address or an iterable of images. None: frames are handed over by :meth:`Stream.put`.
            load_size: as in :meth:`encode`, and so are ``saliency``, ``stride`` and ``fit``.
            policy: ``block``, ``latest`` or ``auto``; see :class:`Policy`.
            latency_budget: seconds from a frame's arrival to its features; results over it count as late.
            stall_timeout: seconds without a frame after which a live source, or a stream that is put into, fails.

        Raises:
            InputError, MissingFileError, SourceError: as :func:`open_source`, or an option that cannot be.
        """
        encoding = EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"), stride, parse(Fit, fit, "fit"))
        options = StreamOptions(parse(Policy, policy, "policy"), latency_budget, stall_timeout)
        return self._stream(HostFrameEncoder(self._encoder, encoding), source, options)

    def stream_on_device(
        self,
        source: Any = None,
        *,
        facets: Iterable[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        policy: str = Policy.AUTO,
        latency_budget: float | None = None,
        stall_timeout: float = 10.0,
    ) -> Stream[DeviceFeatures]:
        """Like :meth:`stream`, but features stay on the GPU, for heads that go on there.

        Uploads, the encoder and heads have GPU streams of their own and overlap; the host waits for what a head brings
        down, and for nothing else. :meth:`tracker`, :meth:`propagator` and :meth:`apply` take the features, and
        :meth:`to_host` gives them to everything else. With results of several frames before the first is used, memory
        of the GPU grows by theirs.

        Args:
            facets: what to keep; all of the bundle's by default.

        Raises:
            InputError: this engine's kernels are not on a GPU; or as :meth:`stream`.
        """
        encoding = EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"), stride)
        options = StreamOptions(parse(Policy, policy, "policy"), latency_budget, stall_timeout)
        return self._stream(self._runner.frame_encoder(self._facets(facets), encoding), source, options)

    def _stream(self, encoder: FrameEncoder[Any, Encoded], source: Any, options: StreamOptions) -> Stream[Encoded]:
        encoder.activate()  # now, and not in the camera's callback that puts the first frame
        return Stream(encoder, source, options)

    def tracker(
        self,
        facet: str | None = None,
        *,
        search_radius: float = TrackOptions.search_radius,
        min_confidence: float = TrackOptions.min_confidence,
    ) -> Tracker:
        """A :class:`Tracker` for this bundle's features: points followed through a video.

        Args:
            facet: the bundle's default for tracking if None.
            search_radius: cells that a visible point may move from frame to frame before it is searched for everywhere.
            min_confidence: below it a point counts as not visible.

        On a GPU it also takes what :meth:`encode_on_device` and :meth:`stream_on_device` give.
        """
        chosen = self.manifest.default_facet("track") if facet is None else facet
        return Tracker(
            chosen,
            search_radius=search_radius,
            min_confidence=min_confidence,
            on_device=choose_comparer(self._encoder),
        )

    def encode_on_device(
        self,
        images: Iterable[ImageLike],
        *,
        facets: Iterable[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        progress: Progress | None = None,
    ) -> list[DeviceFeatures]:
        """Like :meth:`encode`, but descriptors stay on the GPU, for heads and programs that go on there.

        The arrays of the result offer DLPack and the CUDA array interface, so ``torch.from_dlpack(features["key@9"])``
        copies nothing. The host does not wait. :meth:`to_host` brings down what is wanted there.

        Args:
            images: also ``(height, width, 3)`` uint8 RGB arrays of other libraries in GPU memory (DLPack or CUDA array
                interface); ``match`` and ``cosegment`` take those as well. They must not change before the results are
                used or the device is synchronised.
            facets: what to keep; all of the bundle's by default.

        Raises:
            InputError: this engine's kernels are not on a GPU; a facet that was not exported.
        """
        options = EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"), stride)
        return self._runner.encode_on_device(_as_images(images), self._facets(facets), options, progress)

    def to_host(self, features: DeviceFeatures) -> Features:
        """What lies on the GPU of an image, in the processor's memory: the facets that were kept, saliency and pixels.

        Raises:
            InputError: this engine's kernels are not on a GPU.
        """
        return self._runner.to_host(features)

    def match(
        self,
        image_a: ImageLike | Features,
        image_b: ImageLike | Features,
        *,
        num_pairs: int = 10,
        load_size: LoadSize = DEFAULT_SIZE,
        facet: str | None = None,
        hierarchy: int = 2,
        saliency_threshold: float = 0.05,
        progress: Progress | None = None,
    ) -> Matches:
        """Up to ``num_pairs`` diverse point pairs: salient best buddies, one per cluster (Amir et al., section 4.2).

        Args:
            image_a: an image, or its features from :meth:`encode`; ``image_b`` likewise.
            facet: the bundle's default for matching (layer 9 keys for DINO) if None.
            hierarchy: levels of log-binning; 0 for none.
            saliency_threshold: cells must be strictly more salient than this.

        Returns:
            Matches, empty if nothing corresponds.
        """
        given = [item for item in (image_a, image_b) if isinstance(item, Features)]
        for item in given:
            self._check_origin(item, None)
        if len(given) == 2:
            _refuse_load_size(load_size)
        chosen = self._facet("match", facet)
        options = MatchOptions(chosen, num_pairs, hierarchy, saliency_threshold, load_size)
        with self._runner.pair(image_a, image_b, chosen, EncodeOptions(load_size), progress) as pair:
            return match_pair(pair, options)

    def cosegment(
        self,
        images: Images,
        *,
        load_size: LoadSize = DEFAULT_SIZE,
        facet: str | None = None,
        elbow: float = 0.975,
        saliency_threshold: float = 0.065,
        votes_percentage: float = 75,
        sample_interval: int = 100,
        saliency: str | None = None,
        remove_outliers: bool = False,
        outlier_threshold: float = 0.7,
        clustering: str = ClusteringMethod.FACETRT,
        refine: str = Refinement.GRABCUT,
        hierarchy: int = 0,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> Masks:
        """Masks of the objects that the images share (Amir et al., section 4.1).

        Args:
            images: at least two images, or their features from :meth:`encode`, :meth:`collect` or :meth:`extract`.
            facet: the bundle's default for co-segmentation (layer 11 keys for DINO) if None.
            elbow: the first k whose error exceeds this share of the previous one ends the sweep.
            saliency_threshold: an image votes for a cluster whose mean saliency in it is strictly above this.
            votes_percentage: share of the images whose vote makes a cluster foreground.
            sample_interval: every how many-th descriptor of each image is clustered.
            saliency: ``full`` from the descriptors' own pass, or ``low_resolution`` from a second one at half the size
                and stride 8. None: low resolution for images, and features as they were encoded.
            remove_outliers: leave out images whose [CLS] descriptor is less similar to the mean than
                ``outlier_threshold``; their masks are empty.
            clustering: ``facetrt``, or ``faiss``: clusters are trained by FAISS on a GPU, for very many samples (extra
                ``gpu``).
            refine: ``grabcut``, ``crf``, ``pydensecrf`` or ``none``; see :class:`Refinement`.
            hierarchy: levels of log-binning of the descriptors that are clustered; 0 for none, as in the reference
                without ``bin``. Kernels on a GPU have none.
            progress: called with (images done, images in all) while encoding, and from 1 again while refining masks.
            on_broken: as in :meth:`encode`; images left out get no mask.

        Memory stays bounded: features are spilled as in :meth:`collect`, or read from the store that is given. A sample
        of them is clustered, and further passes read a few images at a time.
        """
        chosen = self._facet("cosegment", facet)
        options = CosegmentOptions(
            facet=chosen,
            elbow=elbow,
            saliency_threshold=saliency_threshold,
            votes_percentage=votes_percentage,
            sample_interval=sample_interval,
            remove_outliers=remove_outliers,
            outlier_threshold=outlier_threshold,
            clustering=parse(ClusteringMethod, clustering, "clustering"),
            refine=parse(Refinement, refine, "refine"),
            hierarchy=hierarchy,
            saliency=None if saliency is None else parse(SaliencyMode, saliency, "saliency"),
            load_size=load_size,
        )
        self._runner.check(options)
        if isinstance(images, Sized) and len(images) < 2:
            raise InputError(f"{len(images)} image was given: co-segmentation needs at least 2 that share an object")
        given, plain = self._given(images, load_size, chosen, options.saliency)
        encoding = EncodeOptions(load_size, options.saliency or VOTING)
        with (
            self._runner.encoded(plain, options, encoding, progress, on_broken)
            if given is None
            else self._runner.given(given, options)
        ) as held:
            return cosegment_images(held, options, progress)

    def segment_parts(
        self,
        images: Images,
        *,
        num_parts: int = 4,
        load_size: LoadSize = DEFAULT_SIZE,
        facet: str | None = None,
        elbow: float = 0.975,
        elbow_second_stage: float = 0.94,
        saliency_threshold: float = 0.065,
        votes_percentage: float = 75,
        sample_interval: int = 100,
        saliency: str | None = None,
        num_crop_augmentations: int = 0,
        flip_augmentation: bool = False,
        three_stages: bool = False,
        clustering: str = ClusteringMethod.FACETRT,
        refine: str = Refinement.CRF,
        hierarchy: int = 0,
        seed: int = 0,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> Parts:
        """Parts that the images' common objects share, numbered alike in all images (Amir et al., section 4.1).

        Options that :meth:`cosegment` also has mean the same here.

        Args:
            num_parts: number of part labels.
            elbow_second_stage: elbow of the second stage; only with ``three_stages``.
            num_crop_augmentations: how many random 95 % crops of each image, and of its mirror, join the clusterings.
            flip_augmentation: whether each image's mirror joins as well. Augmented views neither vote nor leave.
            three_stages: find sub-clusters first, drop those that some image lacks, cluster the rest into parts.
            refine: ``crf``, ``pydensecrf`` or ``none``.
            hierarchy: levels of log-binning of the descriptors that are clustered; 0 for none.
            progress: as in :meth:`cosegment`; with three stages maps are refined twice.
            seed: of the random crops.
        """
        options = PartsOptions(
            facet=self._facet("cosegment", facet),
            num_parts=num_parts,
            elbow=elbow,
            elbow_second_stage=elbow_second_stage,
            saliency_threshold=saliency_threshold,
            votes_percentage=votes_percentage,
            sample_interval=sample_interval,
            num_crop_augmentations=num_crop_augmentations,
            flip_augmentation=flip_augmentation,
            three_stages=three_stages,
            clustering=parse(ClusteringMethod, clustering, "clustering"),
            refine=parse(Refinement, refine, "refine"),
            hierarchy=hierarchy,
            seed=seed,
            saliency=None if saliency is None else parse(SaliencyMode, saliency, "saliency"),
            load_size=load_size,
        )
        with (
            self._collection(images, load_size, options.facet, options.saliency, progress, on_broken) as features,
            FeatureCollection([options.facet]) as augmented,
        ):
            if num_crop_augmentations or flip_augmentation:
                self._augment(augmented, features, num_crop_augmentations, flip=flip_augmentation, seed=seed)
            with self._runner.refiner() as refiner:
                return segment_parts_features(features, options, augmented, progress, refiner)

    def _facet(self, task: str, facet: str | None) -> str:
        """``facet``, or the bundle's default for a task.

        Raises:
            InputError: it was not exported.
        """
        chosen = self.manifest.default_facet(task) if facet is None else facet
        if chosen not in self.manifest.facets:
            raise InputError(self.manifest.missing_facet(chosen))
        return chosen

    def _facets(self, facets: Iterable[str] | None) -> list[str]:
        """``facets``, or all of the bundle's.

        Raises:
            InputError: one was not exported.
        """
        chosen = list(self.manifest.facets if facets is None else [facets] if isinstance(facets, str) else facets)
        for facet in chosen:
            if facet not in self.manifest.facets:
                raise InputError(self.manifest.missing_facet(facet))
        return chosen

    def _augment(
        self, augmented: FeatureCollection, features: Sequence[Features], crops: int, *, flip: bool, seed: int
    ) -> None:
        """Add features of augmented views, each loaded as its original was."""
        random = np.random.default_rng(seed)
        for item in features:
            views = augment(item.pixels, crops, flip=flip, random=random)
            load_size = item.load_size if self.manifest.dynamic else item.image_size
            for view in self.encode_iter(views, load_size=load_size, stride=item.stride):
                augmented.append(view)

    def discover(
        self,
        images: Iterable[ImageLike] | Iterable[Features],
        method: str | Method = "tokencut",
        *,
        facet: str | None = None,
        fuse: str | Sequence[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        fit: str | None = None,
        stride: int | None = None,
        refine: str = Refinement.NONE,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
        **options: Any,
    ) -> list[Objects]:
        """The objects of each image, found without labels and without other images.

        Args:
            images: any number of images, or their features from :meth:`encode`, which are taken as they were encoded.
            method: a name of :data:`facetrt.engine.tasks.discovery.catalogue.METHODS`: ``tokencut``, ``lost``,
                ``spectral``, ``maskcut``, ``selfmask``, ``found``, ``dino-seg``; or an instance with its options.
            facet: whose rows the method works on; the method's or the bundle's own for discovery if None. ``-mean``
                behind it takes the image's mean descriptor away; see :mod:`facetrt.engine.tasks.discovery.fusing`.
            fuse: several facets instead, of any kinds and layers: cosines are averaged.
            load_size: as published if none is given: the images' own size, for shorter sides of at most 512 pixels, or
                the method's. None for the images' own whatever it is.
            fit: how images are fitted to whole patches, as in :meth:`encode`; as published if None.
            stride: between cells; the patch size if None, as published, where the bundle has it.
            refine: ``none``, ``bilateral``, ``crf`` or ``grabcut``; boxes are then those of the masks.
            progress: called with (images done, images in all).
            on_broken: as in :meth:`encode`; images left out get no result.
            options: of the method, by name, with its publication's defaults.

        Returns:
            One result per image, in order; one without objects says why.

        Raises:
            InputError: an option that does not exist, a facet that was not exported, an image that cannot be read.
        """
        return list(
            self.discover_iter(
                images,
                method,
                facet=facet,
                fuse=fuse,
                load_size=load_size,
                fit=fit,
                stride=stride,
                refine=refine,
                progress=progress,
                on_broken=on_broken,
                **options,
            )
        )

    def discover_iter(
        self,
        images: Iterable[ImageLike] | Iterable[Features],
        method: str | Method = "tokencut",
        *,
        facet: str | None = None,
        fuse: str | Sequence[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        fit: str | None = None,
        stride: int | None = None,
        refine: str = Refinement.NONE,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
        **options: Any,
    ) -> Iterator[Objects]:
        """Like :meth:`discover`, but yields; only a window of images is held at a time."""
        discovery = self.discovery(method, facet=facet, fuse=fuse, refine=refine, **options)
        first, images = _peek(images)
        if isinstance(first, Features):
            _refuse_load_size(load_size)
            if fit is not None or stride is not None:
                raise InputError("fit and stride say how images are encoded, and features were given: leave them out")
            tally = Tally(images, progress)
            for item in images:
                if not isinstance(item, Features):
                    raise InputError(MIXED)
                self._check_origin(item, None)
                with self._runner.graphs() as graph:
                    found = discovery.find(item, graph=graph)
                yield found
                tally.add()
            return
        encoding = discovery.method.encoding(self.manifest, load_size, fit, stride)
        waiting: dict[int, ImageLike] = {}

        def numbered() -> Iterator[tuple[int, ImageLike]]:
            for number, image in enumerate(cast(Iterable[ImageLike], images)):
                waiting[number] = image
                yield number, image

        tally = Tally(images, progress)
        with closing(self._encoder.encode_numbered(numbered(), encoding, tally.add, on_broken)) as encoded:
            for number, item in encoded:
                image = waiting.pop(number)
                original = partial(_original, image)
                with self._runner.graphs() as graph:
                    found = discovery.find(item, original, graph)
                yield found
                for old in [known for known in waiting if known < number]:  # broken ones
                    del waiting[old]

    def discovery(
        self,
        method: str | Method,
        *,
        facet: str | None = None,
        fuse: str | Sequence[str] | None = None,
        refine: str = Refinement.NONE,
        **options: Any,
    ) -> Discovery:
        """What :meth:`discover` does to the features of each image: for streams, and for programs that encode once."""
        if facet is not None and fuse is not None:
            raise InputError(
                f"facet={facet!r} and fuse={fuse!r} exclude each other: name one facet, or several to fuse"
            )
        chosen = make_method(method, options)
        terms = parse_terms(fuse if fuse is not None else facet or chosen.facet(self.manifest))
        segmenter = self._segmenter if chosen.uses_segmenter else None
        return Discovery(chosen, terms, self.manifest, parse(Refinement, refine, "refine"), segmenter)

    @overload
    def apply(
        self,
        model: SegmentationModel,
        image: ImageLike | Features | DeviceFeatures,
        *,
        load_size: LoadSize = None,
        refine: str = Refinement.NONE,
        smoother: Smoother | None = None,
    ) -> Mask: ...
    @overload
    def apply(
        self,
        model: PartsModel,
        image: ImageLike | Features | DeviceFeatures,
        *,
        load_size: LoadSize = None,
        refine: str = Refinement.NONE,
        smoother: Smoother | None = None,
    ) -> PartMap: ...
    def apply(
        self,
        model: SegmentationModel | PartsModel,
        image: ImageLike | Features | DeviceFeatures,
        *,
        load_size: LoadSize = None,
        refine: str = Refinement.NONE,
        smoother: Smoother | None = None,
    ) -> Mask | PartMap:
        """What a model that was learned from other images finds in this one; each call takes one image or frame.

        On the images that it was learned from, the labels are those of :meth:`cosegment` or :meth:`segment_parts`.

        Args:
            model: from :func:`learn_cosegmentation`, :func:`learn_parts` or a file.
            image: an image, or its features from :meth:`encode` or :meth:`stream`; on a GPU also from
                :meth:`encode_on_device` or :meth:`stream_on_device`, of which distances to the centroids come down.
            load_size: of an image; that of the images the model was learned from if None.
            refine: ``none``, ``crf`` or ``pydensecrf``, for masks also ``grabcut`` or ``bilateral``; see
                :class:`Refinement`.
            smoother: averages over the frames of a video that it is given to, one after the other.

        Raises:
            InputError: a model, or features, of another encoder.
        """
        self.check_model(model)
        chosen = parse(Refinement, refine, "refine")
        check_available(chosen)
        if isinstance(image, (Features, DeviceFeatures)):
            self._check_origin(image if isinstance(image, Features) else image.record, None)
            if load_size is not None:
                _refuse_load_size(load_size)
            if isinstance(image, DeviceFeatures):
                return self._runner.apply(model, image, chosen, smoother)
            return model.apply(image, chosen, smoother)
        size = model.load_size if load_size is None else load_size
        return model.apply(self.encode([image], load_size=size, stride=model.stride)[0], chosen, smoother)

    def check_model(self, model: SegmentationModel | PartsModel) -> None:
        """Raise :class:`InputError` unless a model was learned with this bundle's encoder."""
        own = self._encoder.provenance
        if model.encoder_sha256 != own.encoder_sha256:
            raise InputError(
                f"the model was learned with another encoder ({model.encoder}, {model.encoder_sha256[:12]}…) than this "
                f"bundle's ({own.model}, {own.encoder_sha256[:12]}…): open the bundle it was learned with, or learn it "
                "again with this one"
            )

    def propagator(
        self,
        *,
        facet: str | None = None,
        queue: int = PropagateOptions.queue,
        radius: int = PropagateOptions.radius,
        topk: int = PropagateOptions.topk,
        temperature: float = PropagateOptions.temperature,
    ) -> MaskPropagator:
        """A new :class:`MaskPropagator`: masks of a video's frames from that of the first one.

        Args:
            facet: the bundle's default for propagation (the last block's normed output for DINO) if None.
            queue: as for :class:`MaskPropagator`, and so are ``radius``, ``topk`` and ``temperature``.

        On a GPU it also takes what :meth:`encode_on_device` and :meth:`stream_on_device` give.
        """
        chosen = self._facet("propagate", facet)
        return MaskPropagator(
            chosen,
            queue=queue,
            radius=radius,
            topk=topk,
            temperature=temperature,
            on_device=choose_memory(self._encoder),
        )

    def collect(
        self,
        images: Iterable[ImageLike],
        *,
        facets: Iterable[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        memory_limit: int = MEMORY_LIMIT,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> FeatureCollection:
        """Like :meth:`encode` for any number of images: past ``memory_limit`` bytes, features go to a temporary folder.

        Tasks take the collection as they take a list. Use it as a context manager: closing removes the folder.

        Args:
            facets: what to keep; all of the bundle's by default.
        """
        chosen = facets or self.manifest.facets
        encoding = EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"))
        images = _as_images(images)
        return collect(self._encoder, images, chosen, encoding, progress, on_broken, memory_limit=memory_limit)

    def extract(
        self,
        images: Iterable[ImageLike],
        path: str | Path,
        *,
        facets: Iterable[str] | None = None,
        load_size: LoadSize = DEFAULT_SIZE,
        saliency: str = SaliencyMode.FULL,
        stride: int | None = None,
        fit: str = Fit.NONE,
        force: bool = False,
        progress: Progress | None = None,
        on_broken: OnBroken | None = None,
    ) -> FeatureStore:
        """Like :meth:`encode`, into a Zarr store on disk that tasks take as they take a list, now or later.

        An interrupted run keeps every image that was finished; the same call without ``force`` continues there. Images
        are told by their place in the list, their name and their content; a list (not an iterator) that does not fit
        is refused before anything is written.

        Args:
            path: folder of the store; it is made, or continued if it was made with the same settings.
            facets: what to keep; all of the bundle's by default.
            force: start anew, also where an interrupted run could be continued.

        Raises:
            OutputError: the store was made with other settings or images (the message names what differs), something
                else lies there, or the disk is full. What is there stays.
            MissingDependencyError: zarr is not installed.
        """
        chosen = self.manifest.facets if facets is None else list(facets)
        for facet in chosen:
            if facet not in self.manifest.facets:
                raise InputError(self.manifest.missing_facet(facet))
        return extract_features(
            self._encoder,
            _as_images(images),
            Path(path).resolve(),
            EncodeOptions(load_size, parse(SaliencyMode, saliency, "saliency"), stride, parse(Fit, fit, "fit")),
            chosen,
            force=force,
            progress=progress,
            on_broken=on_broken,
        )

    @cached_property
    def _segmenter(self) -> Segmenter | None:
        data = self._encoder.read_file(SEGMENTER)
        return None if data is None else Segmenter.read(data, SEGMENTER)

    @contextmanager
    def _collection(
        self,
        images: Images,
        load_size: LoadSize,
        facet: str,
        asked: SaliencyMode | None,
        progress: Progress | None,
        on_broken: OnBroken | None,
    ) -> Iterator[Sequence[Features]]:
        """``images`` as features, with the saliency ``asked`` or :data:`VOTING`; features pass as they are."""
        given, plain = self._given(images, load_size, facet, asked)
        if given is not None:
            yield given
            return
        encoding = EncodeOptions(load_size, asked or VOTING)
        with collect(self._encoder, plain, [facet], encoding, progress, on_broken) as collection:
            yield collection

    def _given(
        self, images: Images, load_size: LoadSize, facet: str, asked: SaliencyMode | None
    ) -> tuple[Sequence[Features] | None, Iterable[ImageLike]]:
        """Features, if ``images`` are such, or else the images, which are to be encoded."""
        if isinstance(images, LazySequence):
            _refuse_load_size(load_size)
            self._check_collection(images, facet, asked)
            return images.only([facet]) if isinstance(images, FeatureStore) else images, ()
        first, images = _peek(images)
        if not isinstance(first, Features):
            return None, cast(Iterable[ImageLike], images)  # features among them are refused when it is their turn
        _refuse_load_size(load_size)
        features = []
        for item in images:
            if not isinstance(item, Features):
                raise InputError(MIXED)
            self._check_origin(item, asked)
            features.append(item)
        return features, ()

    def _check_collection(self, images: LazySequence[Features], facet: str, asked: SaliencyMode | None) -> None:
        if isinstance(images, (FeatureCollection, FeatureStore)) and facet not in images.facets:
            raise InputError(
                f"this collection holds {', '.join(images.facets)}, not {facet}: collect it with facets=['{facet}']"
            )
        for item in images[:1]:  # all come from one engine
            self._check_origin(item, asked)

    def _check_origin(self, item: ImageRecord, asked: SaliencyMode | None) -> None:
        own = self._encoder.provenance
        if item.provenance.encoder_sha256 != own.encoder_sha256:
            raise InputError(
                f"the features of {item.name} come from another bundle ({item.provenance.model}): encode it with "
                "this one"
            )
        self._encoder.check_cells(item)
        if asked is not None and item.saliency_mode is not asked:
            raise InputError(
                f"the features of {item.name} have {item.saliency_mode} saliency and {asked} was asked: encode it with "
                f"saliency='{asked}'"
            )

    def close(self) -> None:
        """Give the device back. Features and results stay valid."""
        self._runner.close()
        self._encoder.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def choose_runner(encoder: Encoder) -> Runner:
    """Where the tasks of an engine run: what follows here is the same for both."""
    backend = encoder.backend
    if isinstance(backend, CudaBackend) and backend.options.kernels is Kernels.DEVICE:
        from facetrt.engine.device.running import DeviceRunner

        return DeviceRunner(encoder, backend)
    return HostRunner(encoder)


def choose_memory(encoder: Encoder) -> Callable[[PropagateOptions], Memory] | None:
    """What a mask of frames on the device is followed from; None where no frame lies there."""
    if (backend := _on_device(encoder)) is None:
        return None
    from facetrt.engine.device.propagation import DeviceMemory

    return partial(DeviceMemory, backend.stream)


def choose_comparer(encoder: Encoder) -> Callable[[str], Comparer] | None:
    """What compares frames on the device for points to be followed; None where no frame lies there."""
    if (backend := _on_device(encoder)) is None:
        return None
    from facetrt.engine.device.tracking import DeviceComparer

    return partial(DeviceComparer, backend.stream)


def _on_device(encoder: Encoder) -> CudaBackend | None:
    """The backend, if kernels run where it does."""
    backend = encoder.backend
    return backend if isinstance(backend, CudaBackend) and backend.options.kernels is Kernels.DEVICE else None


def _as_images(images: Iterable[Item]) -> Iterable[Item]:
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) == 4:
        first = "" if shape[3] in (1, 3, 4) or shape[1] not in (1, 3, 4) else ".transpose(0, 2, 3, 1)"
        array = "images" if not first or isinstance(images, np.ndarray) else "numpy.asarray(images)"
        raise InputError(f"an array of shape {shape} was given: write list({array}{first}), one array per image")
    one = (str, bytes, bytearray, memoryview, os.PathLike, Features)
    if isinstance(images, one) or any(
        hasattr(images, name) for name in ("__array__", "__dlpack__", "tobitmap", "read")
    ):
        raise InputError("one image was given where a list was expected: write [image]")
    return images


def _refuse_load_size(load_size: LoadSize) -> None:
    """Raise :class:`InputError` if a load size was asked for where there is nothing to load."""
    if not isinstance(load_size, DefaultSize):
        raise InputError(
            f"load_size={load_size} was given with features, which are loaded already: leave it out, or encode the "
            "images with it"
        )


def _original(image: ImageLike) -> Pixels:
    """The picture at its original size."""
    return load_image(image).pixels


def _peek(images: Any) -> tuple[ImageLike | Features | None, Any]:
    """The first item, or None, and all of them again."""
    source: Iterator[Any] = iter(_as_images(images))
    first = next(source, None)
    return first, images if isinstance(images, Sequence) or first is None else chain([first], source)
