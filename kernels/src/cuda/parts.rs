//! What of CUDA a machine has, asked without failing where something is missing.

/// The parts that kernels on an NVIDIA GPU need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaParts {
    /// CUDA version that the driver supports, as 12.8; nothing where there is no driver.
    pub driver: Option<String>,
    /// The runtime compiler that kernels go through.
    pub has_nvrtc: bool,
    /// Multiplies large matrices; slower kernels of cubecl do without it.
    pub has_cublas: bool,
    pub n_devices: usize,
}

impl CudaParts {
    /// Looks.
    pub fn find() -> CudaParts {
        // SAFETY: these only try to open libraries by name.
        let (has_driver, has_nvrtc, has_cublas) = unsafe {
            (
                cudarc::driver::sys::is_culib_present(),
                cudarc::nvrtc::sys::is_culib_present(),
                cudarc::cublas::sys::is_culib_present(),
            )
        };
        let mut parts = CudaParts { driver: None, has_nvrtc, has_cublas, n_devices: 0 };
        if has_driver {
            let mut version = 0;
            // SAFETY: writes one integer, which outlives the call.
            if unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
                parts.driver = Some(format!("{}.{}", version / 1000, version % 1000 / 10));
            }
            let count = cudarc::driver::CudaContext::device_count().unwrap_or(0);
            parts.n_devices = usize::try_from(count).unwrap_or(0);
        }
        parts
    }

    /// Returns what compiles kernels: the driver, as the CUDA it supports, and NVRTC.
    pub fn compiler(&self) -> String {
        let nvrtc = self.nvrtc_version().unwrap_or_else(|| "0.0".to_owned());
        format!("driver for CUDA {}, NVRTC {nvrtc}", self.driver.as_deref().unwrap_or("none"))
    }

    /// Returns NVRTC's version, as 12.8; `None` if it is missing.
    pub fn nvrtc_version(&self) -> Option<String> {
        let (mut major, mut minor) = (0, 0);
        if self.has_nvrtc {
            // SAFETY: writes two integers, which outlive the call; where it fails they stay 0.
            let _ = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
        }
        (major > 0).then(|| format!("{major}.{minor}"))
    }

    /// Returns the version of cuBLAS, as 12.8.4; `None` if it is missing.
    pub fn cublas_version(&self) -> Option<String> {
        self.has_cublas.then(cublas_version).flatten()
    }

    /// Returns why device `index` can't be used, or nothing.
    pub fn missing(&self, index: usize) -> Option<String> {
        match self {
            CudaParts { driver: None, .. } => Some("no NVIDIA driver (libcuda) was found".to_owned()),
            CudaParts { n_devices, .. } if *n_devices <= index => Some(match n_devices {
                0 => "the NVIDIA driver reports no GPU".to_owned(),
                n => format!("there are {n} CUDA devices, counted from 0"),
            }),
            CudaParts { has_nvrtc: false, .. } => Some(
                "NVRTC (libnvrtc), which compiles kernels, was not found: install the CUDA toolkit or put its lib64 on \
                 LD_LIBRARY_PATH"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// Returns the version of the cuBLAS that is there, as 12.8.4; `None` if it does not tell. The caller has looked that it is.
pub(super) fn cublas_version() -> Option<String> {
    use cudarc::cublas::sys::{cublasGetProperty, libraryPropertyType};
    let number = |property| {
        let mut value = 0;
        // SAFETY: needs no handle and writes one integer, which outlives the call.
        unsafe { cublasGetProperty(property, &mut value) }.result().ok().map(|()| value)
    };
    let major = number(libraryPropertyType::MAJOR_VERSION)?;
    let minor = number(libraryPropertyType::MINOR_VERSION)?;
    let patch = number(libraryPropertyType::PATCH_LEVEL)?;
    Some(format!("{major}.{minor}.{patch}"))
}

/// Bytes of stack that a thread is given from the start; the driver gives a kernel more where it needs more.
const STACK_BYTES: usize = 256;

/// Lowers what the driver sets aside on a device for the stacks of all threads that it can run at once, by default 1 KiB for each: kernels
/// here call nothing, and what one needs is known when it is launched. Where it is refused that memory stays taken.
pub fn shrink_stacks(index: usize) {
    let Ok(context) = cudarc::driver::CudaContext::new(index) else { return };
    let _ = context.set_limit(cudarc::driver::sys::CUlimit::CU_LIMIT_STACK_SIZE, STACK_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_in_the_order_in_which_to_mend_it() {
        let all = CudaParts { driver: Some("13.0".to_owned()), has_nvrtc: true, has_cublas: true, n_devices: 1 };
        assert_eq!(all.missing(0), None);
        assert!(all.missing(1).is_some_and(|reason| reason.contains("there are 1 CUDA devices")));
        let without_nvrtc = CudaParts { has_nvrtc: false, ..all.clone() };
        assert!(without_nvrtc.missing(0).is_some_and(|reason| reason.contains("NVRTC")));
        let nothing = CudaParts { driver: None, has_nvrtc: false, has_cublas: false, n_devices: 0 };
        assert!(nothing.missing(0).is_some_and(|reason| reason.contains("driver")));
    }
}
