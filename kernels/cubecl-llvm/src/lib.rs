//! The names that cubecl-cuda takes from cubecl's LLVM backend. Nothing here compiles a kernel: with the feature
//! `cubecl-cuda/cpp`, which labpipe always sets, kernels go through CUDA C++ and NVRTC.

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_server::compiler::CompilationError;
use cubecl_server::kernel::BufferIOAttr;

pub mod nvptx {
    pub mod ptx_version {
        /// A PTX version; none is ever made, since nothing here emits PTX.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum PtxVersion {}

        impl PtxVersion {
            /// Returns nothing: no PTX is emitted for any driver.
            pub fn for_driver(_driver_version: i32) -> Option<PtxVersion> {
                None
            }
        }

        impl std::fmt::Display for PtxVersion {
            fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {}
            }
        }
    }
}

pub mod shared {
    pub mod lowered_features {
        /// A target whose features would be narrowed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum GpuTarget {
            Nvptx,
        }

        /// Leaves the properties alone: only the LLVM backend would need them narrowed.
        pub fn restrict_features<P>(_properties: &mut P, _target: GpuTarget) {}
    }
}

/// What the real backend can aim at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LlvmTarget {
    Nvptx,
}

/// A compiler that refuses.
#[derive(Debug, Clone)]
pub struct PlironCompiler {
    pub target: LlvmTarget,
}

/// Options of the real compiler.
#[derive(Debug, Clone, Default)]
pub struct PlironOptions {
    pub arch: Option<()>,
    pub sm_arch: Option<SmArch>,
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    pub grid_constants: bool,
    /// Keeps struct-update syntax meaningful for callers that name every field above.
    pub reserved: (),
}

/// A compiled PTX module; never made here.
#[derive(Debug, Clone)]
pub struct NvptxModule {
    pub ptx: Vec<core::ffi::c_char>,
    pub entrypoint: String,
    pub ir: String,
    pub shared_memory_size: usize,
    pub io: Vec<BufferIOAttr>,
}

/// What the real compiler returns.
#[derive(Debug, Clone)]
pub enum PlironArtifact {
    NvptxCode(NvptxModule),
    /// Keeps callers' fall-through arms reachable.
    None,
}

impl PlironCompiler {
    /// Refuses, and says what to enable.
    ///
    /// # Errors
    /// Always.
    pub fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM backend: enable the feature `cubecl-cuda/cpp`".to_owned(),
            backtrace: Default::default(),
        })
    }

    pub fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
