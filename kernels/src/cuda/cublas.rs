//! Large products of plain matrices by cuBLAS, in the order of cubecl's own stream.
//!
//! cubecl does not show its stream, so products run on one of ours, and events of the whole context keep the two in order: ours waits for
//! all that was launched before, and all that is launched later waits for ours. The library is found at run time; where it or a
//! driver with context events (CUDA 12.5) is missing, [`Cublas::open`] says so and callers multiply with cubecl's own kernels.

use crate::cube::{Element, kept};
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::server::Handle;
use cubecl_server::runtime::Runtime;
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::sys as driver;
use std::ffi::c_void;
use std::ptr::null_mut;

/// Oldest driver whose context events work, as CUDA numbers versions.
const MIN_DRIVER_VERSION: i32 = 12_050;

/// Bytes that cuBLAS may use within a product. NVIDIA recommends 32 MiB for Hopper, for products that are split over their inner
/// dimension; those of a prefill have tiles enough.
pub const WORKSPACE_BYTES: usize = 8 << 20;

/// Why cuBLAS is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CublasError {
    #[error("load cuBLAS: libcublas is not on the library path")]
    Missing,
    #[error("use cuBLAS: the driver supports CUDA {found}, context events need {needed}")]
    Driver { found: i32, needed: i32 },
    #[error("use cuBLAS: {0}")]
    Call(String),
}

/// cuBLAS on a device's context. Everything that was made goes when it is dropped.
#[derive(Debug)]
pub struct Cublas {
    /// As 13.0.2.
    pub version: String,
    handle: blas_sys::cublasHandle_t,
    stream: driver::CUstream,
    context: Context,
    before: driver::CUevent,
    after: driver::CUevent,
    // Kept alive: cuBLAS was given its address.
    _workspace: Handle,
}

// SAFETY: the handle, stream and events are used by one thread at a time, since every call needs `&mut self`.
unsafe impl Send for Cublas {}

/// A matrix on the device: its address and element type.
#[derive(Debug, Clone, Copy)]
pub struct Operand {
    address: u64,
    element: Element,
}

impl Operand {
    /// Returns the buffer's address; the caller keeps the handle alive as long as it uses the operand.
    ///
    /// # Errors
    /// Where a kernel that writes the buffer has failed.
    pub fn of(client: &Client, handle: &Handle, element: Element) -> Result<Operand, CublasError> {
        let resource = client
            .get_resource::<<CudaRuntime as Runtime>::Server>(handle.clone())
            .map_err(|error| CublasError::Call(format!("resolve a buffer: {error}")))?;
        Ok(Operand { address: resource.resource().ptr, element })
    }

    /// Returns the operand that starts `n` elements further on.
    pub fn offset(self, n: usize) -> Operand {
        Operand { address: self.address + (n * self.element.size_bytes()) as u64, ..self }
    }
}

fn check(result: driver::CUresult, what: &str) -> Result<(), CublasError> {
    result.result().map_err(|error| CublasError::Call(format!("{what}: {error:?}")))
}

impl Cublas {
    /// Opens the library on the context that the client's device runs in.
    ///
    /// # Errors
    /// `Missing`, `Driver`, `Call`.
    pub fn open(client: &Client) -> Result<Cublas, CublasError> {
        // SAFETY: only looks for the library.
        if !unsafe { blas_sys::is_culib_present() } {
            return Err(CublasError::Missing);
        }
        let mut found = 0;
        // SAFETY: writes one integer, which outlives the call.
        check(unsafe { driver::cuDriverGetVersion(&mut found) }, "ask for the driver's version")?;
        if found < MIN_DRIVER_VERSION {
            return Err(CublasError::Driver { found, needed: MIN_DRIVER_VERSION });
        }
        let workspace = kept(client, WORKSPACE_BYTES);
        let at = Operand::of(client, &workspace, Element::F32)?.address;
        let context = Context::of(client, at)?;
        context.enter()?;
        let version = super::parts::cublas_version().unwrap_or_else(|| "unknown".to_owned());
        // Filled step by step: what is there by then goes where one fails.
        let mut opened = Cublas {
            version,
            handle: null_mut(),
            stream: null_mut(),
            context,
            before: null_mut(),
            after: null_mut(),
            _workspace: workspace,
        };
        let call = |error: blas::CublasError| CublasError::Call(format!("{error:?}"));
        let non_blocking = driver::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let untimed = driver::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: calls in the context just entered, whose out-pointers outlive them; the workspace lives as long as the handle.
        unsafe {
            check(driver::cuStreamCreate(&mut opened.stream, non_blocking), "make a stream")?;
            check(driver::cuEventCreate(&mut opened.before, untimed), "make an event")?;
            check(driver::cuEventCreate(&mut opened.after, untimed), "make an event")?;
            opened.handle = blas::create_handle().map_err(call)?;
            blas::set_stream(opened.handle, opened.stream.cast()).map_err(call)?;
            blas_sys::cublasSetWorkspace_v2(opened.handle, at as *mut c_void, WORKSPACE_BYTES)
                .result()
                .map_err(call)?;
        }
        Ok(opened)
    }

    /// Writes `y = x · Wᵀ`, or adds it to y, with fp32 sums, after everything launched so far and before everything launched later.
    ///
    /// # Shapes
    /// `x` `[m, k]` with rows `x_stride` elements apart, `w` `[n, k]`, `y` `[m, n]` with rows `y_stride` apart.
    ///
    /// # Errors
    /// `Call`.
    #[expect(clippy::too_many_arguments, reason = "a matrix product has this many sizes")]
    pub fn matmul(
        &mut self,
        client: &Client,
        x: Operand,
        x_stride: usize,
        w: Operand,
        y: Operand,
        y_stride: usize,
        [m, n, k]: [usize; 3],
        adds: bool,
    ) -> Result<(), CublasError> {
        let (one, kept) = (1.0f32, if adds { 1.0f32 } else { 0.0f32 });
        client.flush().map_err(|error| CublasError::Call(error.to_string()))?;
        // SAFETY: the operands are live device buffers of these shapes (the caller keeps their handles), and the scalars outlive the call.
        unsafe {
            self.enter()?;
            blas::gemm_ex(
                self.handle,
                blas_sys::cublasOperation_t::CUBLAS_OP_T,
                blas_sys::cublasOperation_t::CUBLAS_OP_N,
                n as i32,
                m as i32,
                k as i32,
                (&raw const one).cast(),
                w.address as *const c_void,
                cuda_type(w.element),
                k as i32,
                x.address as *const c_void,
                cuda_type(x.element),
                x_stride as i32,
                (&raw const kept).cast(),
                y.address as *mut c_void,
                cuda_type(y.element),
                y_stride as i32,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
            .map_err(|error| CublasError::Call(format!("multiply [{m}, {k}] with [{n}, {k}]: {error:?}")))?;
            self.leave()
        }
    }

    unsafe fn enter(&self) -> Result<(), CublasError> {
        // SAFETY: the context, event and stream live as long as `self`.
        unsafe {
            self.context.enter()?;
            check(driver::cuCtxRecordEvent(self.context.raw, self.before), "mark earlier work")?;
            check(driver::cuStreamWaitEvent(self.stream, self.before, 0), "wait for earlier work")
        }
    }

    unsafe fn leave(&self) -> Result<(), CublasError> {
        // SAFETY: as in `enter`.
        unsafe {
            check(driver::cuEventRecord(self.after, self.stream), "mark the product")?;
            check(driver::cuCtxWaitEvent(self.context.raw, self.after), "hold later work back")
        }
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // Errors while it is dropped can't be returned.
        let _ = self.context.enter();
        // SAFETY: nothing uses them afterwards; what was never made is null.
        unsafe {
            if !self.stream.is_null() {
                let _ = driver::cuStreamSynchronize(self.stream);
            }
            if !self.handle.is_null() {
                let _ = blas::destroy_handle(self.handle);
            }
            for event in [self.before, self.after].into_iter().filter(|event| !event.is_null()) {
                let _ = driver::cuEventDestroy_v2(event);
            }
            if !self.stream.is_null() {
                let _ = driver::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}

/// The context that a client's device runs in.
#[derive(Debug)]
struct Context {
    raw: driver::CUcontext,
    /// The device whose primary context was retained for it, until it is dropped.
    retained: Option<driver::CUdevice>,
}

impl Context {
    /// Finds the context of a client's buffer at `address`; where the driver names none (buffers of its memory pools), the primary one
    /// of the client's own device.
    fn of(client: &Client, address: u64) -> Result<Context, CublasError> {
        let mut raw: driver::CUcontext = null_mut();
        let mut device = 0;
        // SAFETY: plain driver calls; every out-pointer is a local that outlives its call.
        unsafe {
            let attribute = driver::CUpointer_attribute::CU_POINTER_ATTRIBUTE_CONTEXT;
            check(driver::cuPointerGetAttribute((&raw mut raw).cast(), attribute, address), "find the context")?;
            if !raw.is_null() {
                return Ok(Context { raw, retained: None });
            }
            let index = i32::from(client.service_id().device.index_id);
            check(driver::cuDeviceGet(&mut device, index), "find the device")?;
            check(driver::cuDevicePrimaryCtxRetain(&mut raw, device), "find the device's context")?;
        }
        Ok(Context { raw, retained: Some(device) })
    }

    fn enter(&self) -> Result<(), CublasError> {
        // SAFETY: the context lives as long as cubecl's server, or as `self` where that retained it.
        check(unsafe { driver::cuCtxSetCurrent(self.raw) }, "enter the context")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: it was retained once; errors while it is dropped can't be returned.
            let _ = unsafe { driver::cuDevicePrimaryCtxRelease_v2(device) };
        }
    }
}

fn cuda_type(element: Element) -> blas_sys::cudaDataType {
    match element {
        Element::F32 => blas_sys::cudaDataType::CUDA_R_32F,
        Element::F16 => blas_sys::cudaDataType::CUDA_R_16F,
        Element::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
    }
}
