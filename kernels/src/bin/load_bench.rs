//! Times how fast matrices of Llama-3.2-3B's shape go from host memory to the device: plain, and quantized there.
//!
//!     cargo run --release -p labpipe-kernels --features cuda --bin load-bench [file=PATH] [SCHEME..]
//!
//! SCHEME is `f16`, `nf4`, `nf4-dq`, `fp4`, `int8` or `int4`; all of them unless named. The source is a buffer of 1 GiB, larger than
//! processors' caches, that is read again and again; with `file=PATH` it is written to a new file there, which is read as a model's is.

use labpipe_kernels::SchemeSpec;
use labpipe_kernels::cube::quantize::Reading;
use labpipe_kernels::cube::{Element, FileMatrix, Form, MatrixLoader};
use labpipe_kernels::weight::SharedBytes;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

const N_LAYERS: usize = 28;
const HIDDEN: usize = 3072;
/// Matrices that are stored as one, by the heights of their parts and their width.
const PROJECTIONS: [(&[usize], usize); 4] =
    [(&[3072, 1024, 1024], HIDDEN), (&[3072], HIDDEN), (&[8192, 8192], HIDDEN), (&[HIDDEN], 8192)];
const SOURCE_BYTES: usize = 1 << 30;
const READING: Reading = Reading { source: Element::F16, base: Element::F16 };

fn spec(name: &str) -> Option<SchemeSpec> {
    match name {
        "f16" => None,
        "nf4-dq" => Some(SchemeSpec { double_quant: true, ..SchemeSpec::new("nf4") }),
        other => Some(SchemeSpec::new(other)),
    }
}

/// Takes parts of the source one after the other, from its beginning again behind its end.
struct Source {
    bytes: SharedBytes,
    at: usize,
}

impl Source {
    fn part(&mut self, n_rows: usize, n_cols: usize) -> FileMatrix {
        let n_bytes = n_rows * n_cols * READING.source.size_bytes();
        if self.at + n_bytes > SOURCE_BYTES {
            self.at = 0;
        }
        let bytes = self.bytes.slice(self.at..self.at + n_bytes);
        self.at += n_bytes;
        FileMatrix { n_rows, bytes, reading: READING }
    }
}

/// Returns what is read: a buffer, or the file that it is written to and that goes again when it is opened.
fn source(file: Option<&str>) -> std::io::Result<SharedBytes> {
    // Small values of both signs; a multiplicative walk through fp16's bits below 1.
    let halves = (0..SOURCE_BYTES / 2).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 16) as u16 & 0xafff);
    let bytes: Vec<u8> = halves.flat_map(u16::to_le_bytes).collect();
    let Some(path) = file else { return Ok(SharedBytes::new(Arc::new(bytes), 0..SOURCE_BYTES)) };
    std::fs::OpenOptions::new().write(true).create_new(true).open(path)?.write_all(&bytes)?;
    let file = std::fs::File::open(path)?;
    std::fs::remove_file(path)?;
    Ok(SharedBytes::mapped(Arc::new(bytes), Arc::new(file), 0..SOURCE_BYTES))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (files, named): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("file="));
    let file = files.first().and_then(|argument| argument.strip_prefix("file="));
    let all = ["f16", "nf4", "nf4-dq", "fp4", "int8", "int4"].map(str::to_owned);
    #[cfg(not(feature = "wgpu"))]
    if let Some(missing) = labpipe_kernels::cube::nvidia::CudaParts::find().missing(0) {
        return Err(format!("load-bench takes a GPU: {missing}").into());
    }
    // Without what earlier runs compiled: LABPIPE_KERNEL_CACHE=off.
    let _kernels = labpipe_kernels::cube::kernel_store::KernelStore::open(
        &labpipe_kernels::cube::nvidia::CudaParts::find().compiler(),
    );
    let client = cubecl::Device::default().client();
    let mut source = Source { bytes: source(file)?, at: 0 };
    println!("{:>8} {:>10} {:>8} {:>10} {:>10}", "scheme", "first s", "then s", "GB/s", "device MB");
    for name in if named.is_empty() { &all[..] } else { &named } {
        let form = Form::of(spec(name).as_ref(), Element::F16)?.ok_or("no kernels for this scheme")?;
        let mut times = Vec::new();
        let (mut n_read, mut n_held) = (0, 0u64);
        for _ in 0..3 {
            n_read = 0;
            let start = Instant::now();
            let mut held = Vec::new();
            let mut loader = MatrixLoader::new(&client);
            let mut load = |loader: &mut MatrixLoader<'_>, form, rows: &[usize], n_cols| -> std::io::Result<_> {
                let parts: Vec<FileMatrix> = rows.iter().map(|n| source.part(*n, n_cols)).collect();
                n_read += parts.iter().map(|part| part.bytes.len()).sum::<usize>();
                loader.load(form, n_cols, &parts, |_, _, bytes| bytes.map(drop))
            };
            held.push(load(&mut loader, Form::Plain(Element::F16), &[128_256], HIDDEN)?);
            for _ in 0..N_LAYERS {
                for (rows, n_cols) in PROJECTIONS {
                    held.push(load(&mut loader, form, rows, n_cols)?);
                }
                loader.turn()?;
            }
            loader.settle()?;
            cubecl::future::block_on(client.sync())?;
            times.push(start.elapsed().as_secs_f64());
            n_held = held.iter().map(|matrix| matrix.device_bytes()).sum::<u64>();
        }
        let then = times[1..].iter().copied().fold(f64::INFINITY, f64::min);
        println!(
            "{name:>8} {:>10.3} {then:>8.3} {:>10.1} {:>10.1}",
            times[0],
            n_read as f64 / then / 1e9,
            n_held as f64 / 1e6
        );
    }
    Ok(())
}
