//! What a kernel takes of a multiprocessor, read from its cubin: an ELF file with one section of code for each kernel.

use object::read::elf::{ElfFile64, FileHeader, SectionHeader};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol};

/// Resources of one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// As the driver finds it.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of shared memory that a CTA has without asking for them.
    pub static_shared_bytes: usize,
    /// Bytes of a thread's stack: local arrays and what is spilled.
    pub stack_bytes: u32,
}

/// Why a cubin was not read.
#[derive(Debug, thiserror::Error)]
pub enum CubinError {
    #[error("read a cubin: {0}")]
    Elf(#[from] object::read::Error),
    #[error("a cubin with {0} kernels instead of one")]
    Kernels(usize),
    #[error("a cubin whose .nv.info ends within an attribute")]
    CutShort,
    #[error("kernel {entry} has no attribute {attribute:#x}")]
    NoAttribute { entry: String, attribute: u8 },
    #[error("kernel {entry}: {section} registers by its section, {attribute} by .nv.info")]
    Disagree { entry: String, section: u32, attribute: u32 },
}

/// Attributes of `.nv.info`, each of a symbol: bytes of a frame, of the least stack, registers (`EIATTR_*` of CUDA's binary utilities).
const FRAME_SIZE: u8 = 0x11;
const MIN_STACK_SIZE: u8 = 0x12;
const REGCOUNT: u8 = 0x2f;

/// Format of an attribute whose bytes follow its head; others hold their value in the head's last two bytes.
const SIZED: u8 = 4;

/// Bytes of shared memory that CUDA reserves in each CTA (CUDA C++ Programming Guide, Compute Capability 9.x, Shared Memory).
const SYSTEM_SHARED_BYTES: usize = 1024;

impl Usage {
    /// Reads the one kernel of a cubin.
    ///
    /// # Errors
    /// Where the file isn't what CUDA 13's assembler writes.
    pub fn read(cubin: &[u8]) -> Result<Usage, CubinError> {
        let file = ElfFile64::<LittleEndian>::parse(cubin)?;
        let entries: Vec<String> = file
            .sections()
            .filter_map(|section| section.name().ok()?.strip_prefix(".text.").map(str::to_owned))
            .collect();
        let [entry] = entries.as_slice() else { return Err(CubinError::Kernels(entries.len())) };
        let entry = entry.clone();
        let endian = file.endian();
        let text = file.section_by_name(&format!(".text.{entry}")).expect("the section that named the kernel");
        // A section's info: its symbol in the low 24 bits, registers above them.
        let by_section = text.elf_section_header().sh_info(endian) >> 24;
        let symbol = file
            .symbols()
            .find(|symbol| symbol.name() == Ok(entry.as_str()) && symbol.section_index() == Some(text.index()));
        let symbol_idx = symbol.map_or(0, |symbol| symbol.index().0 as u32);
        let info = file.section_by_name(".nv.info").map(|section| section.data()).transpose()?.unwrap_or_default();
        let of = |attribute| {
            value(info, attribute, symbol_idx)?
                .ok_or_else(|| CubinError::NoAttribute { entry: entry.clone(), attribute })
        };
        let registers = of(REGCOUNT)?;
        if by_section != 0 && by_section != registers {
            return Err(CubinError::Disagree { entry, section: by_section, attribute: registers });
        }
        let stack_bytes = of(FRAME_SIZE)?.max(of(MIN_STACK_SIZE)?);
        let size_of = |name: &str| file.section_by_name(name).map(|section| section.size() as usize);
        // From compute capability 9.0 on, the section counts what the system keeps for itself, which no limit of a CTA includes.
        let reserved_bytes = if size_of(".nv.shared.reserved.0").is_some() { SYSTEM_SHARED_BYTES } else { 0 };
        let static_shared_bytes =
            size_of(&format!(".nv.shared.{entry}")).map_or(0, |n_bytes| n_bytes.saturating_sub(reserved_bytes));
        debug_assert_eq!(file.elf_header().e_machine(endian), object::elf::EM_CUDA);
        Ok(Usage { entry, registers, static_shared_bytes, stack_bytes })
    }
}

/// Returns an attribute of a symbol; `None` if it is missing.
fn value(info: &[u8], attribute: u8, symbol_idx: u32) -> Result<Option<u32>, CubinError> {
    let mut rest = info;
    while !rest.is_empty() {
        let (&[format, found, low, high], behind) = rest.split_first_chunk::<4>().ok_or(CubinError::CutShort)?;
        let n_bytes = if format == SIZED { usize::from(u16::from_le_bytes([low, high])) } else { 0 };
        let (body, behind) = behind.split_at_checked(n_bytes).ok_or(CubinError::CutShort)?;
        if let (true, &[s0, s1, s2, s3, v0, v1, v2, v3]) = (found == attribute, body)
            && u32::from_le_bytes([s0, s1, s2, s3]) == symbol_idx
        {
            return Ok(Some(u32::from_le_bytes([v0, v1, v2, v3])));
        }
        rest = behind;
    }
    Ok(None)
}

/// What the assembler says of a kernel (`--ptxas-options=--verbose`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    pub registers: u32,
    pub stack_bytes: u32,
    /// Bytes that a thread stores to its stack because registers do not suffice.
    pub spill_store_bytes: u32,
}

impl Reported {
    /// Reads the compiler's log; `None` if it does not say.
    pub fn read(log: &str) -> Option<Reported> {
        let before = |what: &str| log[..log.find(what)?].trim_end().rsplit(' ').next()?.parse().ok();
        Some(Reported {
            registers: before("registers")?,
            stack_bytes: before("bytes stack frame")?,
            spill_store_bytes: before("bytes spill stores")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_by_symbol() {
        let attribute = |attribute: u8, symbol: u32, value: u32| {
            [&[SIZED, attribute, 8, 0], &symbol.to_le_bytes()[..], &value.to_le_bytes()].concat()
        };
        let unsized_one = vec![3, 0x1b, 0xff, 0];
        let info = [attribute(REGCOUNT, 4, 40), unsized_one, attribute(FRAME_SIZE, 7, 16), attribute(REGCOUNT, 7, 168)];
        let info = info.concat();
        assert_eq!(value(&info, REGCOUNT, 7).expect("whole attributes"), Some(168));
        assert_eq!(value(&info, FRAME_SIZE, 7).expect("whole attributes"), Some(16));
        assert_eq!(value(&info, MIN_STACK_SIZE, 7).expect("whole attributes"), None);
        assert!(matches!(value(&info[..info.len() - 1], REGCOUNT, 7), Err(CubinError::CutShort)));
    }

    #[test]
    fn assembler_log_is_read() {
        let log = "ptxas info    : Compiling entry function 'a_kernel' for 'sm_86'\n\
                   ptxas         .     16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads\n\
                   ptxas info    : Used 220 registers, used 1 barriers, 16 bytes cumulative stack size\n";
        let reported = Reported { registers: 220, stack_bytes: 16, spill_store_bytes: 20 };
        assert_eq!(Reported::read(log), Some(reported));
        assert_eq!(Reported::read("warning: something else"), None);
    }
}
