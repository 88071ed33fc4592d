//! A weight on a device of burn's cubecl backend, and how large products with it are done.

use crate::cube::DeviceMatrix;
#[cfg(feature = "cuda")]
use crate::cube::cublas::Cublas;
use burn_cubecl::CubeDevice;
use cubecl::client::Client;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A matrix in its stored form on a device, with what its products need beside it.
#[derive(Clone)]
pub struct DeviceWeight {
    matrix: DeviceMatrix,
    device: CubeDevice,
    outlier_threshold: Option<f32>,
    rounds_few_rows: bool,
    large: Arc<LargeProducts>,
}

impl DeviceWeight {
    /// Takes a matrix that lies on `device`. With an `outlier_threshold` its products are those of LLM.int8().
    pub fn new(
        matrix: DeviceMatrix,
        device: CubeDevice,
        outlier_threshold: Option<f32>,
        large: Arc<LargeProducts>,
    ) -> DeviceWeight {
        DeviceWeight { matrix, device, outlier_threshold, rounds_few_rows: false, large }
    }

    /// Lets products with a few rows of f32 round those to halves, as tensor cores take them: where a model computes in halves, and
    /// single tokens are only kept in f32 between its products.
    #[must_use]
    pub fn rounding_few_rows(self, rounds_few_rows: bool) -> DeviceWeight {
        DeviceWeight { rounds_few_rows, ..self }
    }

    pub(super) fn rounds_few_rows(&self) -> bool {
        self.rounds_few_rows
    }

    pub fn matrix(&self) -> &DeviceMatrix {
        &self.matrix
    }

    pub fn device(&self) -> &CubeDevice {
        &self.device
    }

    pub(super) fn outlier_threshold(&self) -> Option<f32> {
        self.outlier_threshold
    }

    pub(super) fn large(&self) -> &LargeProducts {
        &self.large
    }
}

impl fmt::Debug for DeviceWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DeviceMatrix { kind, n_rows, n_cols, .. } = &self.matrix;
        write!(f, "DeviceWeight({kind:?}, [{n_rows}, {n_cols}], {:?})", self.device)
    }
}

/// What multiplies many rows at once, shared by the weights of a model: cuBLAS if it could be opened, else burn's own matrix product.
pub struct LargeProducts {
    #[cfg(feature = "cuda")]
    blas: Option<Mutex<Cublas>>,
    /// Why cuBLAS does not multiply; `None` if it does.
    without_cublas: Option<String>,
    /// The first failure of cuBLAS.
    failure: Mutex<Option<String>>,
}

impl LargeProducts {
    /// Opens cuBLAS on the client's device, where there is one.
    pub fn open(client: &Client) -> LargeProducts {
        if client.name() != "cuda" {
            return LargeProducts::with_burn(format!("cuBLAS runs on CUDA alone, this device is {}", client.name()));
        }
        #[cfg(feature = "cuda")]
        match Cublas::open(client) {
            Ok(blas) => LargeProducts { blas: Some(Mutex::new(blas)), without_cublas: None, failure: Mutex::new(None) },
            Err(error) => LargeProducts::with_burn(error.to_string()),
        }
        #[cfg(not(feature = "cuda"))]
        LargeProducts::with_burn("this build has no CUDA".to_owned())
    }

    /// Multiplies with burn's own matrix product, for `reason`.
    pub fn with_burn(reason: String) -> LargeProducts {
        LargeProducts {
            #[cfg(feature = "cuda")]
            blas: None,
            without_cublas: Some(reason),
            failure: Mutex::new(None),
        }
    }

    /// Returns the version of the cuBLAS that multiplies, or why there is none.
    ///
    /// # Errors
    /// The reason.
    pub fn cublas(&self) -> Result<String, String> {
        #[cfg(feature = "cuda")]
        if let Some(blas) = &self.blas {
            return Ok(blas.lock().unwrap_or_else(PoisonError::into_inner).version.clone());
        }
        Err(self.without_cublas.clone().unwrap_or_default())
    }

    /// Returns the first failure of cuBLAS: results since then are not those of one way of multiplying.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs `multiply` with cuBLAS; false if there is none, or if it failed, which [`failure`](Self::failure) then tells.
    #[cfg(feature = "cuda")]
    pub(super) fn by_cublas(
        &self,
        multiply: impl FnOnce(&mut Cublas) -> Result<(), crate::cube::cublas::CublasError>,
    ) -> bool {
        let Some(blas) = &self.blas else { return false };
        let multiplied = multiply(&mut blas.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = &multiplied {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert_with(|| error.to_string());
        }
        multiplied.is_ok()
    }
}
