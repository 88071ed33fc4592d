//! Products with stored matrices: which kernel does one, and the scratch that a quantized one is decoded into.

use super::weights::Projection;
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
#[cfg(feature = "cuda")]
use labpipe_kernels::cube::cublas::{Cublas, Operand};
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Kind, Place};

/// Bytes of decoded rows that are multiplied at a time: they stay in L2 between the two kernels.
const PANEL_BYTES: usize = 24 << 20;

/// Returns the kernels' name for an element type.
pub fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::F16 => Element::F16,
        DType::Bf16 => Element::Bf16,
    }
}

/// Multiplies rows of activations with stored matrices.
pub struct Products {
    pub client: Client,
    /// What activations of whole sequences are stored in.
    pub element: Element,
    #[cfg(feature = "cuda")]
    blas: Option<Cublas>,
    #[cfg(feature = "cuda")]
    panel: Option<Handle>,
}

impl Products {
    /// Opens what the device has; without cuBLAS products are slower, not wrong.
    pub fn new(client: Client, element: Element) -> Products {
        Products {
            #[cfg(feature = "cuda")]
            blas: if client.name() == "cuda" { Cublas::open(&client).ok() } else { None },
            #[cfg(feature = "cuda")]
            panel: None,
            client,
            element,
        }
    }

    /// Writes `y = x · Wᵀ + b`.
    ///
    /// # Shapes
    /// `x` `[m, n_in]`, `y` `[m, n_out]`, both in the activations' type.
    ///
    /// # Errors
    /// `Device` where cuBLAS fails.
    pub fn project(&mut self, x: &Handle, projection: &Projection, y: &Handle, m: usize) -> Result<(), InferenceError> {
        let y_stride = projection.n_out;
        let mut y_first = 0;
        for part in &projection.parts {
            self.multiply(x, part, y, Place { x_row: 0, y_first, y_stride }, m, self.element)?;
            y_first += part.n_rows;
        }
        if let Some(bias) = &projection.bias {
            cube::add_bias(&self.client, self.element, y, bias, m, y_stride);
        }
        Ok(())
    }

    /// Writes `y = x[first..first + m] · Wᵀ` in fp32.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    pub fn logits(
        &mut self,
        x: &Handle,
        head: &DeviceMatrix,
        y: &Handle,
        [first, m]: [usize; 2],
    ) -> Result<(), InferenceError> {
        self.multiply(x, head, y, Place { x_row: first, ..Place::whole(head) }, m, Element::F32)
    }

    fn multiply(
        &mut self,
        x: &Handle,
        matrix: &DeviceMatrix,
        y: &Handle,
        place: Place,
        m: usize,
        out: Element,
    ) -> Result<(), InferenceError> {
        #[cfg(feature = "cuda")]
        if self.blas.is_some() {
            return self.by_cublas(x, matrix, y, place, m, out);
        }
        cube::linear(&self.client, matrix, [self.element, out], x, None, y, place, m);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn by_cublas(
        &mut self,
        x: &Handle,
        matrix: &DeviceMatrix,
        y: &Handle,
        place: Place,
        m: usize,
        out: Element,
    ) -> Result<(), InferenceError> {
        let fail = |error: labpipe_kernels::cube::cublas::CublasError| InferenceError::Device {
            device: "cuda".to_owned(),
            reason: error.to_string(),
        };
        let (client, element) = (&self.client, self.element);
        let Some(blas) = self.blas.as_mut() else { unreachable!("the caller looked") };
        let x_operand = Operand::of(client, x, element).map_err(fail)?;
        let y_operand = Operand::of(client, y, out).map_err(fail)?.offset(place.y_first);
        let k = matrix.n_cols;
        let x_operand = x_operand.offset(place.x_row * k);
        let is_plain = matches!(
            (matrix.kind, element),
            (Kind::F32, Element::F32) | (Kind::F16, Element::F16) | (Kind::Bf16, Element::Bf16)
        );
        if is_plain {
            let w = Operand::of(client, &matrix.codes, element).map_err(fail)?;
            return blas
                .matmul(client, x_operand, k, w, y_operand, place.y_stride, [m, matrix.n_rows, k])
                .map_err(fail);
        }
        let row_bytes = k * element.size_bytes();
        let panel_rows = (PANEL_BYTES / row_bytes).clamp(1, matrix.n_rows);
        let n_bytes = PANEL_BYTES.max(row_bytes);
        let panel = self.panel.get_or_insert_with(|| client.empty(n_bytes));
        let w = Operand::of(client, panel, element).map_err(fail)?;
        for first in (0..matrix.n_rows).step_by(panel_rows) {
            let n = panel_rows.min(matrix.n_rows - first);
            cube::dequantize(client, matrix, element, first, n, panel);
            let y = y_operand.offset(first);
            blas.matmul(client, x_operand, k, w, y, place.y_stride, [m, n, k]).map_err(fail)?;
        }
        Ok(())
    }
}
