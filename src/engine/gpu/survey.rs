//! What quantizing loses, measured on the device: a linear is quantized there as loading does it, and compared with what it was made
//! of. Only sums come back.

use super::products::element;
use super::room::Room;
use super::rows::device_error;
use crate::engine::survey::{Candidate, Measured, on_host};
use crate::engine::weights::{UnreadWeight, WeightReader};
use crate::event::Progress;
use crate::inference::InferenceError;
use cubecl::client::Client;
use labpipe_kernels::cube::quantize::Reading;
use labpipe_kernels::cube::{Element, FileMatrix, Form, LossMeter, MatrixLoader, measuring_bytes};
use std::io;

/// Measures linears one after the other. The device holds one of them at a time, and tiles.
pub struct Surveyor<'a> {
    client: &'a Client,
    room: &'a Room,
    reader: &'a WeightReader<'a>,
    progress: &'a dyn Progress,
    loader: MatrixLoader<'a>,
    meter: LossMeter<'a>,
}

impl<'a> Surveyor<'a> {
    pub fn new(
        client: &'a Client,
        room: &'a Room,
        reader: &'a WeightReader<'a>,
        progress: &'a dyn Progress,
    ) -> Surveyor<'a> {
        let (loader, meter) = (MatrixLoader::new(client), LossMeter::new(client));
        Surveyor { client, room, reader, progress, loader, meter }
    }

    /// Measures a linear: on the device where its scheme has kernels that quantize, else on the host.
    ///
    /// # Errors
    /// Whatever is wrong with its tensor or its scheme; `OutOfMemory`, `Cancelled`.
    pub fn measure(&mut self, candidate: &Candidate<'_>) -> Result<Measured, InferenceError> {
        let refused = |error: labpipe_kernels::SchemeError| candidate.refused(error);
        let scheme = labpipe_kernels::scheme(&candidate.scheme.scheme)
            .and_then(|scheme| scheme.normalize(candidate.scheme))
            .map_err(refused)?;
        // The type is that of plain values, which these are not.
        let Some(form) = Form::of(Some(&scheme), Element::F32).map_err(refused)? else {
            return on_host(self.reader, candidate);
        };
        let (n_out, n_in) = (candidate.n_out, candidate.n_in);
        let Some(unread) = self.reader.unread_weight(candidate.module, &[n_out, n_in])? else {
            return on_host(self.reader, candidate);
        };
        let (mse, sqnr_db) = self.loss(form, n_in, &unread)?;
        Ok(Measured { scheme, bytes: form.stored_bytes(n_out, n_in), mse, sqnr_db })
    }

    fn loss(&mut self, form: Form, n_in: usize, unread: &UnreadWeight) -> Result<(f64, Option<f64>), InferenceError> {
        let file = FileMatrix {
            n_rows: unread.tensor.shape[0],
            bytes: unread.tensor.bytes.clone(),
            reading: Reading { source: element(unread.tensor.dtype), base: element(unread.base) },
        };
        self.room.check(&format!("{}, quantized", unread.name), measuring_bytes(form, n_in, &file))?;
        let progress = self.progress;
        let look = |_: usize, at: usize, bytes: io::Result<&[u8]>| match progress.is_cancelled() {
            true => Err(InferenceError::Cancelled),
            false => unread.check(at, bytes.map_err(|error| unread.unreadable(&error))?),
        };
        let matrix = self.loader.load(form, n_in, std::slice::from_ref(&file), look)?;
        self.loader.settle().map_err(device_error)?;
        let loss = self.meter.measure(&matrix, &file, |at, bytes| look(0, at, bytes))?;
        loss.read(self.client).map_err(device_error)
    }
}
