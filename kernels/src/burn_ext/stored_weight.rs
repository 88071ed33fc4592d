//! A linear's weight where it is multiplied.

#[cfg(feature = "burn-cube")]
use super::DeviceWeight;
use crate::weight::HostWeight;
use burn::backend::DispatchDevice;
use burn::tensor::Device;

/// A weight in its stored form: bytes on the host, or a matrix on a device.
#[derive(Debug)]
pub enum StoredWeight {
    Host(HostWeight),
    #[cfg(feature = "burn-cube")]
    Device(DeviceWeight),
}

/// Activations and a weight that do not lie in the same place; neither is copied to the other's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("multiply activations on {activations} with a weight on {weight}: load the model on one device")]
pub struct ElsewhereError {
    pub activations: String,
    pub weight: String,
}

/// Why a product with a stored weight has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProductError {
    #[error(transparent)]
    Elsewhere(#[from] ElsewhereError),
    /// cuBLAS, which multiplied before, failed.
    #[error("multiply: {0}")]
    Cublas(String),
}

impl StoredWeight {
    /// Returns the first failure among products with this weight and those that share its way of multiplying.
    ///
    /// # Errors
    /// [`ProductError::Cublas`].
    pub(super) fn check_products(&self) -> Result<(), ProductError> {
        match self {
            StoredWeight::Host(_) => Ok(()),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(weight) => {
                weight.large().failure().map_or(Ok(()), |reason| Err(ProductError::Cublas(reason)))
            }
        }
    }

    /// Number of output features.
    pub fn n_rows(&self) -> usize {
        match self {
            StoredWeight::Host(weight) => weight.n_rows(),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(weight) => weight.matrix().n_rows,
        }
    }

    /// Number of input features.
    pub fn n_cols(&self) -> usize {
        match self {
            StoredWeight::Host(weight) => weight.n_cols(),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(weight) => weight.matrix().n_cols,
        }
    }

    /// Bytes stored: elements, or codes and their statistics.
    pub fn stored_bytes(&self) -> u64 {
        match self {
            StoredWeight::Host(weight) => weight.stored_bytes(),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(weight) => weight.matrix().device_bytes(),
        }
    }

    /// Returns the weight where the host holds it.
    pub fn as_host(&self) -> Option<&HostWeight> {
        match self {
            StoredWeight::Host(weight) => Some(weight),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(_) => None,
        }
    }

    /// Checks that activations on `device` can be multiplied with the weight.
    ///
    /// # Errors
    /// [`ElsewhereError`] where the two lie in different places.
    pub fn check_place(&self, device: &Device) -> Result<(), ElsewhereError> {
        let place = device.as_dispatch();
        let is_here = match (self, place) {
            (StoredWeight::Host(_), DispatchDevice::Flex(_)) => true,
            #[cfg(feature = "burn-cube")]
            (StoredWeight::Device(weight), DispatchDevice::Cube(device)) => weight.device() == device,
            #[cfg(feature = "burn-cube")]
            _ => false,
        };
        if is_here {
            return Ok(());
        }
        let weight = match self {
            StoredWeight::Host(_) => "the host".to_owned(),
            #[cfg(feature = "burn-cube")]
            StoredWeight::Device(weight) => format!("{:?}", weight.device()),
        };
        Err(ElsewhereError { activations: format!("{place:?}"), weight })
    }
}

impl From<HostWeight> for StoredWeight {
    fn from(weight: HostWeight) -> StoredWeight {
        StoredWeight::Host(weight)
    }
}
