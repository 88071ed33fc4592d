//! A stand-in for cubecl's CUDA server: it has a GPU's properties and no memory, and collects kernels instead of running them. So the
//! library's own launches choose the kernels that are compiled, as they would on that GPU.
//!
//! Properties and options follow `CudaServer::init` of cubecl-cuda 0.11.3 (src/runtime.rs).

use crate::launches::{Extent, Launches};
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::cmma::MatrixLayout;
use cubecl::future::DynFut;
use cubecl::ir::features::{Plane, TypeUsage};
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, OpaqueType, TargetProperties, VectorSize,
};
use cubecl::profile::{ProfileDuration, TimingMethod};
use cubecl::server::{
    BufferBinding, CopyDescriptor, IoError, KernelArguments, ProfileError, ProfilingToken, Server, ServerCommunication,
    ServerError, ServerStorage, ServerUtilities,
};
use cubecl::{CubeCount, CubeKernel};
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::CudaCmmaCompiler;
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use cubecl_cpp::cuda::{supported_mma_combinations, supported_scaled_mma_combinations};
use cubecl_cpp::register_supported_types;
use cubecl_cpp::shared::{
    CompilationOptions, CppSupportedFeatures, register_mma_features, register_scaled_mma_features,
    register_wmma_features,
};
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::PitchedMemoryLayoutPolicy;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{ManagedMemoryHandle, MemoryAllocationMode, StreamMemoryReport};
use cubecl_server::storage::{ComputeStorage, ManagedResource, StorageHandle, StorageId};
use std::sync::{Arc, Mutex};

/// A GPU that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// Compute capability, 80 for 8.0.
    pub sm: u32,
    /// One that has it.
    pub name: &'static str,
    pub n_multiprocessors: u32,
    /// Bytes of shared memory that a CTA can have (CUDA C++ Programming Guide, Technical Specifications per Compute Capability).
    pub max_shared_bytes: usize,
    /// What is compiled for it.
    pub extent: Extent,
}

const fn gpu(sm: u32, name: &'static str, n_multiprocessors: u32, shared_kib: usize, extent: Extent) -> Gpu {
    Gpu { sm, name, n_multiprocessors, max_shared_bytes: shared_kib * 1024, extent }
}

/// The full product of variants and architectures would take more than ten minutes of two processors. So all variants are compiled
/// for 8.6, which has the least shared memory, all models' products and attention for 9.0 too, where launches overlap, and for the others
/// each kernel at the main model's shapes: what an architecture changes is the code and its registers, not the shared memory.
pub const GPUS: [Gpu; 6] = [
    gpu(80, "A100", 108, 163, Extent::Main),
    gpu(86, "RTX 3090", 82, 99, Extent::All),
    gpu(89, "RTX 4090", 128, 99, Extent::Main),
    gpu(90, "H200", 132, 227, Extent::Models),
    gpu(100, "B200", 148, 227, Extent::Main),
    gpu(120, "RTX 5090", 170, 99, Extent::Main),
];

impl Gpu {
    /// Returns the architecture that cubecl names to NVRTC.
    pub fn architecture(&self) -> String {
        format!("sm_{}{}", self.sm, if self.sm >= 90 { "a" } else { "" })
    }

    /// Returns how cubecl lowers kernels for it; `CUDA_VERSION` is 12.8 or newer.
    pub fn options(&self) -> CompilationOptions {
        let is_hopper = self.sm >= 90;
        let supports_features = CppSupportedFeatures {
            grid_constants: true,
            clusters: is_hopper,
            fast_math: true,
            fast_tanh: true,
            elect_sync: is_hopper,
            dp4a: true,
        };
        CompilationOptions { warp_size: 32, supports_features, amd_wmma: None }
    }

    fn properties(&self) -> DeviceProperties {
        let arch = CudaArchitecture { version: self.sm, tensor_cores: true };
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: self.max_shared_bytes,
            max_cube_count: (i32::MAX as u32, 65_535, 65_535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(self.n_multiprocessors),
            num_tensor_cores: (self.sm <= 100).then_some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity =
            DeviceIdentity { name: self.name.to_owned(), fingerprint: format!("ptx_sm{}", self.sm), physical: None };
        let memory = MemoryDeviceProperties::new(20 << 30, 512).with_max_memory(80 << 30);
        let mut properties =
            DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device, identity);
        register_supported_types(&mut properties);
        properties.register_opaque_type(OpaqueType::Barrier);
        properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
        let features = &mut properties.features;
        for half in [FloatKind::F16, FloatKind::BF16] {
            features.matmul.ldmatrix.insert(ElemType::Float(half));
            if self.sm >= 90 {
                features.matmul.stmatrix.insert(ElemType::Float(half));
            }
        }
        features.copy_async = true;
        features.cube_cluster = self.sm >= 90;
        features.memory_reinterpret = true;
        features.alignment = true;
        features.device_memory_scope = true;
        for plane in [Plane::Sync, Plane::Ops, Plane::NonUniformControlFlow] {
            features.plane.insert(plane);
        }
        register_wmma_features(CudaCmmaCompiler::Cpp.supported_cmma_combinations(&arch), &mut properties);
        register_mma_features(supported_mma_combinations(&arch), &mut properties);
        register_scaled_mma_features(supported_scaled_mma_combinations(&arch), &mut properties);
        properties
    }

    /// Launches as if on this GPU; returns the kernels, each once, in that order.
    pub fn kernels_of(&self, launches: &Launches) -> Vec<Box<dyn CubeKernel>> {
        let index_id = GPUS.iter().position(|gpu| gpu == self).expect("a GPU of the list") as u16;
        let client = Client::load::<Collector>(DeviceId { type_id: 0, index_id });
        (launches.launch)(&client, self.extent);
        cubecl::future::block_on(client.sync()).expect("launches that are collected");
        let mut launched = LAUNCHED.lock().expect("no thread that panicked");
        let mut seen = std::collections::HashSet::new();
        let kernels = std::mem::take(&mut launched[usize::from(index_id)]);
        kernels.into_iter().filter(|kernel| seen.insert(kernel.id().stable_hash())).collect()
    }
}

/// Kernels that were launched, by GPU.
static LAUNCHED: Mutex<[Vec<Box<dyn CubeKernel>>; GPUS.len()]> = Mutex::new([const { Vec::new() }; GPUS.len()]);

/// The server.
#[derive(Debug)]
struct Collector {
    device: usize,
    utilities: Arc<ServerUtilities>,
}

impl DeviceService for Collector {
    fn init(device_id: DeviceId) -> Collector {
        let device = usize::from(device_id.index_id);
        let mma = MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        };
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Collector>(device_id),
            "cuda",
            GPUS[device].properties(),
            TargetProperties { mma },
            Arc::new(ServerLogger::default()),
            PitchedMemoryLayoutPolicy::new(512),
        );
        Collector { device, utilities: Arc::new(utilities) }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for Collector {}

impl Server for Collector {
    fn initialize_memory(&mut self, _: ManagedMemoryHandle, _: u64, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    /// Returns zeros.
    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let zeros = |descriptor: &CopyDescriptor| {
            Bytes::from_bytes_vec(vec![0; descriptor.shape.iter().product::<usize>() * descriptor.elem_size])
        };
        let bytes = descriptors.iter().map(zeros).collect();
        Box::pin(async move { Ok(bytes) })
    }

    fn write(&mut self, _: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {}

    fn sync(&mut self, _: Vec<BufferBinding>, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn check(&mut self, _: Vec<BufferBinding>, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        _: CubeCount,
        _: KernelArguments,
        _: StreamId,
        _: LaunchMode,
    ) {
        LAUNCHED.lock().expect("no thread that panicked")[self.device].push(kernel);
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_report(&mut self, _: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        unimplemented!("nothing here is timed")
    }

    fn end_profile(&mut self, _: StreamId, _: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        unimplemented!("nothing here is timed")
    }

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}

impl ServerStorage for Collector {
    type Storage = NoStorage;

    fn get_resource(&mut self, _: BufferBinding, _: StreamId) -> Result<ManagedResource<()>, ServerError> {
        Err(no_memory().into())
    }
}

/// Nothing is stored.
struct NoStorage;

fn no_memory() -> IoError {
    IoError::UnsupportedIoOperation { backtrace: BackTrace::capture() }
}

impl ComputeStorage for NoStorage {
    type Resource = ();

    fn alignment(&self) -> usize {
        512
    }

    fn get(&mut self, _: &StorageHandle) -> Result<(), IoError> {
        Err(no_memory())
    }

    fn alloc(&mut self, _: u64) -> Result<StorageHandle, IoError> {
        Err(no_memory())
    }

    fn dealloc(&mut self, _: StorageId) {}

    fn flush(&mut self) {}

    fn bytes_allocated(&self) -> u64 {
        0
    }
}
