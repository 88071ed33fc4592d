//! Products with stored matrices: which kernel does one, and how a quantized one is decoded on its way.
//!
//! Where cuBLAS is, quantized rows are decoded to a panel, which it multiplies; it also adds a sublayer's output to the
//! residual stream, in fp32. Elsewhere one kernel decodes and multiplies.

use super::arena::Mlp;
use super::weights::Projection;
use crate::inference::InferenceError;
use crate::units::DType;
use cubecl::client::Client;
use cubecl::server::Handle;
#[cfg(feature = "cuda")]
use labpipe_kernels::cube::cublas::{Cublas, CublasError, Operand};
use labpipe_kernels::cube::ops::Gate;
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Kind, NotTaken, Piece, Place};
use std::ops::Range;

/// Bytes of decoded rows at most: they stay in L2 between the two kernels.
pub const PANEL_BYTES: usize = 24 << 20;

/// Rows that are decoded at a time where memory counts. At 2,048 tokens their product is 128 tiles of 128 by 256, which the 132
/// multiprocessors of a Hopper GPU do at once.
pub const PANEL_ROWS: usize = 2048;

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
    blas: Result<Cublas, NotTaken>,
    /// Lets tests run the cuBLAS path without cuBLAS, in panels of so many bytes.
    test_panel_bytes: Option<usize>,
}

/// Scratch that a piece of a quantized matrix is decoded into.
pub struct Panel {
    pub handle: Handle,
    pub n_bytes: usize,
}

/// Where x, the matrix and y lie, for cuBLAS.
#[cfg(feature = "cuda")]
type Found = Option<[Operand; 3]>;
#[cfg(not(feature = "cuda"))]
type Found = Option<std::convert::Infallible>;

/// Gate rows of a product, with the up rows that belong to them.
pub struct GateRows {
    pub rows: Range<usize>,
    pub at_a_time: usize,
}

/// Where a product goes.
#[derive(Clone, Copy)]
struct Target<'a> {
    y: &'a Handle,
    element: Element,
    place: Place,
    /// It is added to what is there.
    adds: bool,
}

impl Products {
    /// Opens what the device has; without cuBLAS products are slower, not wrong.
    pub fn new(client: Client, element: Element) -> Products {
        Products {
            #[cfg(feature = "cuda")]
            blas: if client.name() == "cuda" {
                Cublas::open(&client).map_err(NotTaken::failed)
            } else {
                Err(NotTaken::Runtime)
            },
            test_panel_bytes: None,
            client,
            element,
        }
    }

    /// Takes the kernels that every device has.
    #[cfg(test)]
    pub fn without_cublas(client: Client, element: Element) -> Products {
        Products {
            #[cfg(feature = "cuda")]
            blas: Err(NotTaken::Untried),
            test_panel_bytes: None,
            client,
            element,
        }
    }

    /// Runs the cuBLAS path; where there is no cuBLAS, with the kernels that every device has.
    #[cfg(test)]
    pub fn in_panels(client: Client, element: Element, panel_bytes: usize) -> Products {
        Products { test_panel_bytes: Some(panel_bytes), ..Products::new(client, element) }
    }

    /// Returns the version of the cuBLAS that multiplies; why there is none.
    #[cfg(feature = "cuda")]
    pub fn cublas(&self) -> Result<String, NotTaken> {
        self.blas.as_ref().map(|blas| blas.version.clone()).map_err(Clone::clone)
    }

    /// As with CUDA, which this program is built without.
    #[cfg(not(feature = "cuda"))]
    pub fn cublas(&self) -> Result<String, NotTaken> {
        Err(NotTaken::Runtime)
    }

    /// Returns true where quantized matrices are decoded to panels and products are added to the residual stream.
    pub fn has_panels(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.blas.is_ok() {
            return true;
        }
        self.test_panel_bytes.is_some()
    }

    /// Returns true in tests of panels, which short passes take too then.
    pub fn is_tested(&self) -> bool {
        self.test_panel_bytes.is_some()
    }

    /// Returns true where a matrix is decoded to a panel on its way.
    pub fn is_decoded(&self, matrix: &DeviceMatrix) -> bool {
        let is_plain = matches!(
            (matrix.kind, self.element),
            (Kind::F32, Element::F32) | (Kind::F16, Element::F16) | (Kind::Bf16, Element::Bf16)
        );
        self.has_panels() && !is_plain
    }

    /// Returns how many bytes a panel has for matrices whose longest rows have `n_cols` columns, `hidden` those of most.
    pub fn panel_bytes(&self, hidden: usize, n_cols: usize, is_narrow: bool) -> usize {
        let size = self.element.size_bytes();
        let n_bytes = if is_narrow { (PANEL_ROWS * hidden * size).min(PANEL_BYTES) } else { PANEL_BYTES };
        self.test_panel_bytes.unwrap_or(n_bytes).max(2 * n_cols * size)
    }

    /// Returns how an MLP runs panel by panel; `adds` where down's products are added to the residual stream.
    pub fn mlp_panels(&self, panel_bytes: usize, hidden: usize, ffn: usize, adds: bool) -> Mlp {
        let n_rows = panel_bytes / (2 * hidden * self.element.size_bytes());
        // Whole tiles, and columns that are decoded eight at a time.
        let gate_rows = if n_rows >= 64 { n_rows / 64 * 64 } else { n_rows }.clamp(1, ffn);
        let product_cols = if adds { (2 * gate_rows).min(ffn) } else { ffn };
        Mlp::Panels { gate_rows, product_cols }
    }

    /// Writes `y = x · Wᵀ + b`.
    ///
    /// # Shapes
    /// `x` `[m, n_in]`, `y` `[m, n_out]`, both in the activations' type.
    ///
    /// # Errors
    /// `Device` where cuBLAS fails.
    pub fn project(
        &mut self,
        x: &Handle,
        projection: &Projection,
        y: &Handle,
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        let y_stride = projection.n_out;
        self.project_into(x, projection, y, self.element, false, m, panel)?;
        if let Some(bias) = &projection.bias {
            cube::add_bias(&self.client, self.element, y, bias, m, y_stride);
        }
        Ok(())
    }

    /// Adds `x · Wᵀ` to `y`, which is the residual stream; the caller asked [`has_panels`](Self::has_panels), and there is no bias.
    ///
    /// # Shapes
    /// `x` `[m, n_in]`, `y` `[m, n_out]` f32.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    pub fn project_add(
        &mut self,
        x: &Handle,
        projection: &Projection,
        y: &Handle,
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        self.project_into(x, projection, y, Element::F32, true, m, panel)
    }

    #[expect(clippy::too_many_arguments, reason = "a product's operands, where it goes, and scratch")]
    fn project_into(
        &mut self,
        x: &Handle,
        projection: &Projection,
        y: &Handle,
        element: Element,
        adds: bool,
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        let mut y_first = 0;
        for part in &projection.parts {
            let place = Place { x_row: 0, y_first, y_stride: projection.n_out };
            self.multiply(x, part, Target { y, element, place, adds }, m, panel)?;
            y_first += part.n_rows;
        }
        Ok(())
    }

    /// Writes `y = act(x · gateᵀ) · (x · upᵀ)` for some gate rows, a panel at a time: the sums before the activation
    /// take `wide` and no more. The projection is one matrix of gate rows, then up rows, without a bias.
    ///
    /// # Shapes
    /// `x` `[m, n_in]`, `wide` `[m, 2·at_a_time]`, `y` `[m, rows]`.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    #[expect(clippy::too_many_arguments, reason = "a product's operands, where it goes, and scratch")]
    pub fn gated(
        &mut self,
        x: &Handle,
        projection: &Projection,
        gate: Gate,
        gates: &GateRows,
        [wide, y]: [&Handle; 2],
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        let matrix = &projection.parts[0];
        let (n_half, element, client) = (matrix.n_rows / 2, self.element, self.client.clone());
        let rows = &gates.rows;
        let found = self.found(x, wide, element, &panel.handle)?;
        for first in rows.clone().step_by(gates.at_a_time) {
            let n = gates.at_a_time.min(rows.end - first);
            let both = [first..first + n, n_half + first..n_half + first + n];
            let piece = Piece { rows: both, cols: 0..matrix.n_cols };
            let decoded = self.decode(matrix, &piece, panel);
            let place = Place::whole(&decoded);
            self.multiply_plain(x, &decoded, Target { y: wide, element, place, adds: false }, m, &found)?;
            cube::gate_columns(&client, element, gate, true, wide, y, [m, n], [first - rows.start, rows.len()]);
        }
        Ok(())
    }

    /// Adds `x · Wᵀ` over the columns `cols` of W to `y`, which is the residual stream. [`mlp_panels`](Self::mlp_panels) gives no more
    /// of them than a panel has room for.
    ///
    /// # Shapes
    /// `x` `[m, cols.len()]`, `y` `[m, n_out]` f32.
    ///
    /// # Errors
    /// As [`project`](Self::project).
    pub fn add_columns(
        &mut self,
        x: &Handle,
        projection: &Projection,
        cols: &Range<usize>,
        y: &Handle,
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        let mut y_first = 0;
        let found = self.found(x, y, Element::F32, &panel.handle)?;
        for part in &projection.parts {
            let place = Place { x_row: 0, y_first, y_stride: projection.n_out };
            let decoded = self.decode(part, &Piece { rows: [0..part.n_rows, 0..0], cols: cols.clone() }, panel);
            self.multiply_plain(x, &decoded, Target { y, element: Element::F32, place, adds: true }, m, &found)?;
            y_first += part.n_rows;
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
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        let place = Place { x_row: first, ..Place::whole(head) };
        self.multiply(x, head, Target { y, element: Element::F32, place, adds: false }, m, panel)
    }

    fn multiply(
        &mut self,
        x: &Handle,
        matrix: &DeviceMatrix,
        target: Target<'_>,
        m: usize,
        panel: &Panel,
    ) -> Result<(), InferenceError> {
        if !self.is_decoded(matrix) {
            let found = self.found(x, target.y, target.element, &matrix.codes)?;
            return self.multiply_plain(x, matrix, target, m, &found);
        }
        let found = self.found(x, target.y, target.element, &panel.handle)?;
        let panel_rows = (panel.n_bytes / (matrix.n_cols * self.element.size_bytes())).max(1);
        for first in (0..matrix.n_rows).step_by(panel_rows) {
            let rows = first..(first + panel_rows).min(matrix.n_rows);
            let place = Place { y_first: target.place.y_first + first, ..target.place };
            let decoded = self.decode(matrix, &Piece::rows(matrix, rows), panel);
            self.multiply_plain(x, &decoded, Target { place, ..target }, m, &found)?;
        }
        Ok(())
    }

    /// Looks up where a product's buffers lie, for cuBLAS: once for all pieces of a matrix, since each look waits for the runtime.
    #[cfg(feature = "cuda")]
    fn found(&self, x: &Handle, y: &Handle, y_element: Element, w: &Handle) -> Result<Found, InferenceError> {
        if self.blas.is_err() {
            return Ok(None);
        }
        let of = |handle, element| Operand::of(&self.client, handle, element).map_err(blas_error);
        Ok(Some([of(x, self.element)?, of(w, self.element)?, of(y, y_element)?]))
    }

    /// As with cuBLAS, which is not here.
    #[cfg(not(feature = "cuda"))]
    fn found(&self, _x: &Handle, _y: &Handle, _y_element: Element, _w: &Handle) -> Result<Found, InferenceError> {
        Ok(None)
    }

    /// Decodes a piece of a matrix, which the panel has room for.
    fn decode(&self, matrix: &DeviceMatrix, piece: &Piece, panel: &Panel) -> DeviceMatrix {
        assert!(
            piece.n_rows() * piece.cols.len() * self.element.size_bytes() <= panel.n_bytes,
            "{piece:?} does not fit"
        );
        cube::dequantize_piece(&self.client, matrix, self.element, piece, &panel.handle);
        DeviceMatrix::plain(self.element, &panel.handle, piece.n_rows(), piece.cols.len())
    }

    /// Multiplies with a matrix that is not decoded to a panel first.
    fn multiply_plain(
        &mut self,
        x: &Handle,
        matrix: &DeviceMatrix,
        target: Target<'_>,
        m: usize,
        found: &Found,
    ) -> Result<(), InferenceError> {
        #[cfg(feature = "cuda")]
        if let (Ok(blas), Some([x, w, y])) = (&mut self.blas, found) {
            let (k, place) = (matrix.n_cols, target.place);
            let (x, y) = (x.offset(place.x_row * k), y.offset(place.y_first));
            return blas
                .matmul(&self.client, x, k, *w, y, place.y_stride, [m, matrix.n_rows, k], target.adds)
                .map_err(blas_error);
        }
        debug_assert!(found.is_none(), "only cuBLAS has buffers looked up");
        let elements = [self.element, target.element];
        match target.adds {
            true => cube::linear_add(&self.client, matrix, elements, [x, target.y], target.place, m),
            false => cube::linear(&self.client, matrix, elements, x, None, target.y, target.place, m),
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
fn blas_error(error: CublasError) -> InferenceError {
    InferenceError::Device { device: "cuda".to_owned(), reason: error.to_string() }
}
