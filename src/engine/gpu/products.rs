//! Products with stored matrices: which kernel does one, and the scratch that a quantized one is decoded into.

use super::weights::Projection;
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
#[cfg(feature = "cuda")]
use labpipe_kernels::cube::Kind;
#[cfg(feature = "cuda")]
use labpipe_kernels::cube::cublas::{Cublas, CublasError, Operand};
use labpipe_kernels::cube::ops::Gate;
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Place};

/// Bytes of decoded rows that are multiplied at a time: they stay in L2 between the two kernels.
#[cfg(feature = "cuda")]
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

    /// Returns how many columns [`gated`](Self::gated) needs beside x, or nothing where it does not take a projection: one matrix of
    /// gate rows, then up rows, that is decoded panel by panel.
    #[cfg(feature = "cuda")]
    pub fn gated_width(&self, projection: &Projection) -> Option<usize> {
        let [matrix] = projection.parts.as_slice() else { return None };
        let is_decoded = !is_plain(matrix.kind, self.element);
        (self.blas.is_some() && is_decoded && projection.bias.is_none())
            .then(|| 2 * self.gated_rows(matrix.n_cols, matrix.n_rows / 2))
    }

    /// As with cuBLAS, which is not here.
    #[cfg(not(feature = "cuda"))]
    pub fn gated_width(&self, _projection: &Projection) -> Option<usize> {
        None
    }

    /// Gate rows of a panel, which holds as many up rows.
    #[cfg(feature = "cuda")]
    fn gated_rows(&self, n_cols: usize, n_rows: usize) -> usize {
        (PANEL_BYTES / (2 * n_cols * self.element.size_bytes())).clamp(1, n_rows)
    }

    /// Writes `y = act(x · gateᵀ) · (x · upᵀ)` a panel at a time: the sums before the activation take `wide` and no more.
    ///
    /// # Shapes
    /// `x` `[m, n_in]`, `wide` `[m, gated_width]`, `y` `[m, n_out / 2]`.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    #[cfg(feature = "cuda")]
    pub fn gated(
        &mut self,
        x: &Handle,
        projection: &Projection,
        gate: Gate,
        [wide, y]: [&Handle; 2],
        m: usize,
    ) -> Result<(), InferenceError> {
        let matrix = &projection.parts[0];
        let (n_half, k) = (matrix.n_rows / 2, matrix.n_cols);
        let panel_rows = self.gated_rows(k, n_half);
        let (client, element) = (self.client.clone(), self.element);
        let panel = self.panel(k);
        for first in (0..n_half).step_by(panel_rows) {
            let n = panel_rows.min(n_half - first);
            cube::dequantize(&client, matrix, element, first, n, &panel);
            let up = panel.clone().offset_start((n * k * element.size_bytes()) as u64);
            cube::dequantize(&client, matrix, element, n_half + first, n, &up);
            let x_operand = Operand::of(&client, x, element).map_err(blas_error)?;
            let w = Operand::of(&client, &panel, element).map_err(blas_error)?;
            let out = Operand::of(&client, wide, element).map_err(blas_error)?;
            let Some(blas) = self.blas.as_mut() else { unreachable!("`gated_width` looked") };
            blas.matmul(&client, x_operand, k, w, out, 2 * n, [m, 2 * n, k]).map_err(blas_error)?;
            cube::gate_columns(&client, element, gate, true, wide, y, [m, n], [first, n_half]);
        }
        Ok(())
    }

    /// As with cuBLAS, which is not here.
    #[cfg(not(feature = "cuda"))]
    pub fn gated(
        &mut self,
        _x: &Handle,
        _projection: &Projection,
        _gate: Gate,
        _buffers: [&Handle; 2],
        _m: usize,
    ) -> Result<(), InferenceError> {
        unreachable!("`gated_width` takes no projection")
    }

    /// Returns the scratch that rows are decoded into, made when it is first needed.
    #[cfg(feature = "cuda")]
    fn panel(&mut self, n_cols: usize) -> Handle {
        let n_bytes = PANEL_BYTES.max(2 * n_cols * self.element.size_bytes());
        let client = &self.client;
        self.panel.get_or_insert_with(|| client.empty(n_bytes)).clone()
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
        let (client, element) = (self.client.clone(), self.element);
        let x_operand = Operand::of(&client, x, element).map_err(blas_error)?;
        let y_operand = Operand::of(&client, y, out).map_err(blas_error)?.offset(place.y_first);
        let k = matrix.n_cols;
        let x_operand = x_operand.offset(place.x_row * k);
        if is_plain(matrix.kind, element) {
            let w = Operand::of(&client, &matrix.codes, element).map_err(blas_error)?;
            let Some(blas) = self.blas.as_mut() else { unreachable!("the caller looked") };
            return blas
                .matmul(&client, x_operand, k, w, y_operand, place.y_stride, [m, matrix.n_rows, k])
                .map_err(blas_error);
        }
        let row_bytes = k * element.size_bytes();
        let panel_rows = (PANEL_BYTES / row_bytes).clamp(1, matrix.n_rows);
        let panel = self.panel(k);
        let w = Operand::of(&client, &panel, element).map_err(blas_error)?;
        let Some(blas) = self.blas.as_mut() else { unreachable!("the caller looked") };
        for first in (0..matrix.n_rows).step_by(panel_rows) {
            let n = panel_rows.min(matrix.n_rows - first);
            cube::dequantize(&client, matrix, element, first, n, &panel);
            let y = y_operand.offset(first);
            blas.matmul(&client, x_operand, k, w, y, place.y_stride, [m, n, k]).map_err(blas_error)?;
        }
        Ok(())
    }
}

/// Returns true where cuBLAS reads a matrix as it is stored.
#[cfg(feature = "cuda")]
fn is_plain(kind: Kind, element: Element) -> bool {
    matches!((kind, element), (Kind::F32, Element::F32) | (Kind::F16, Element::F16) | (Kind::Bf16, Element::Bf16))
}

#[cfg(feature = "cuda")]
fn blas_error(error: CublasError) -> InferenceError {
    InferenceError::Device { device: "cuda".to_owned(), reason: error.to_string() }
}
