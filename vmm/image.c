/*
 * Image files: ELF and Multiboot 1, their notes and their symbols. Nothing here knows of KVM: bytes of
 * a file become bytes of guest memory, an entry point, and names for addresses.
 *
 * How to read it. image_load() at the end of the first half is the whole story; what stands above it
 * are its steps. A file may be damaged or malicious: every read goes through image_read(), every write
 * through memory_at(), and each refusal is one line.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pvh.h"
#include "vmm.h"

/* An image that has more is not one of ours, nor a kernel: it is damaged or malicious. */
#define SEGMENTS_MAX 64

/* One byte range of the file that becomes one byte range of guest memory; the rest is zero. */
struct segment {
    uint64_t offset, file_size;
    gpa_t gpa;
    uint64_t memory_size;
};

struct symbol {
    uint64_t gva;
    const char *name;
};

static struct {
    const char *path;
    const uint8_t *bytes;
    uint64_t size;
    bool is_elf, is_64;
    Elf64_Ehdr elf; /* ELF32 widened */
    struct segment segments[SEGMENTS_MAX];
    unsigned segment_count;
    struct entry entry;
    struct symbol *symbols; /* by gva */
    size_t symbol_count;
    bool symbols_are_loaded;
} image;

#define image_die(format, ...) die(STATUS_HOST, "%s: " format, image.path, ##__VA_ARGS__)

static bool image_has(uint64_t offset, uint64_t size) {
    return size <= image.size && offset <= image.size - size;
}

/* Copied out, since nothing in a file need be aligned. */
__attribute__((warn_unused_result)) static bool image_read(uint64_t offset, void *to,
                                                           uint64_t size) {
    if (!image_has(offset, size))
        return false;
    memcpy(to, image.bytes + offset, size);
    return true;
}

/* The bytes of an array element, or false if its index makes no sense. */
static bool image_read_item(uint64_t base, uint64_t index, void *to, uint64_t size) {
    return base <= image.size && index <= image.size / size &&
           image_read(base + index * size, to, size);
}

/* Read the ELF header, if there is one; that of an ELF32 file is widened. */
static bool image_elf_header(void) {
    Elf64_Ehdr *header = &image.elf;
    const unsigned char *ident = header->e_ident;
    Elf32_Ehdr narrow;
    if (!image_read(0, header->e_ident, EI_NIDENT) || memcmp(ident, ELFMAG, SELFMAG) != 0)
        return false;
    image.is_64 = ident[EI_CLASS] == ELFCLASS64;
    if (!(image.is_64 ? image_read(0, header, sizeof *header)
                      : image_read(0, &narrow, sizeof narrow)))
        image_die("the ELF header is truncated");
    if (!image.is_64) {
        header->e_machine = narrow.e_machine;
        header->e_entry = narrow.e_entry;
        header->e_phoff = narrow.e_phoff;
        header->e_phnum = narrow.e_phnum;
    }
    if (ident[EI_DATA] != ELFDATA2LSB || (!image.is_64 && ident[EI_CLASS] != ELFCLASS32) ||
        header->e_machine != (image.is_64 ? EM_X86_64 : EM_386))
        image_die("an ELF file for another machine: class %u, byte order %u, e_machine %u",
                  ident[EI_CLASS], ident[EI_DATA], header->e_machine);
    if (header->e_phnum > SEGMENTS_MAX)
        image_die("%u program headers are absurd: at most %u", header->e_phnum, SEGMENTS_MAX);
    return true;
}

void image_open(const char *path) {
    image.path = path;
    int fd = open(path, O_RDONLY);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) < 0)
        image_die("cannot read the image: %s", strerror(errno));
    if (!S_ISREG(status.st_mode) || status.st_size == 0)
        image_die("%s", S_ISREG(status.st_mode) ? "the file is empty" : "not a file");
    image.size = (uint64_t)status.st_size;
    image.bytes = mmap(NULL, image.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (image.bytes == MAP_FAILED)
        image_die("cannot read the image: %s", strerror(errno));
    close(fd);
    image.is_elf = image_elf_header();
}

static Elf64_Phdr image_program_header(unsigned index) {
    uint64_t table = image.elf.e_phoff;
    Elf64_Phdr wide;
    Elf32_Phdr narrow;
    if (!(image.is_64 ? image_read_item(table, index, &wide, sizeof wide)
                      : image_read_item(table, index, &narrow, sizeof narrow)))
        image_die("the program headers are truncated");
    if (!image.is_64)
        wide = (Elf64_Phdr){narrow.p_type,  narrow.p_flags,  narrow.p_offset, narrow.p_vaddr,
                            narrow.p_paddr, narrow.p_filesz, narrow.p_memsz,  narrow.p_align};
    return wide;
}

/* The descriptor of the first note with this name and type: its offset in the file, or 0. */
static uint64_t image_note_in(const Elf64_Phdr *segment, const char *name, uint32_t type,
                              uint32_t *size) {
    uint64_t align = segment->p_align == 8 ? 8 : 4;
    uint64_t at = segment->p_offset;
    uint64_t left = segment->p_filesz;
    Elf64_Nhdr note;
    while (left >= sizeof note && image_read(at, &note, sizeof note)) {
        uint64_t name_size = (sizeof note + note.n_namesz + align - 1) / align * align;
        uint64_t note_size = (name_size + note.n_descsz + align - 1) / align * align;
        *size = note.n_descsz;
        if (name_size + *size > left || !image_has(at, name_size + *size))
            return 0;
        if (note.n_type == type && note.n_namesz == strlen(name) + 1 &&
            !memcmp(image.bytes + at + sizeof note, name, note.n_namesz))
            return at + name_size;
        at += note_size;
        left -= note_size < left ? note_size : left;
    }
    return 0;
}

static uint64_t image_note(const char *name, uint32_t type, uint32_t *size) {
    for (unsigned i = 0; image.is_elf && i < image.elf.e_phnum; i++) {
        Elf64_Phdr segment = image_program_header(i);
        uint64_t at = segment.p_type == PT_NOTE ? image_note_in(&segment, name, type, size) : 0;
        if (at)
            return at;
    }
    return 0;
}

struct machine_note image_machine(void) {
    struct machine_note note = {MACHINE_NOTE_VERSION, 64, MACHINE_IRQCHIP_NONE, MACHINE_DEVICE_COM1,
                                MACHINE_UNKNOWN_IO_FATAL};
    uint32_t size;
    uint64_t at = image_note(MACHINE_NOTE_NAME, MACHINE_NOTE_TYPE, &size);
    if (at && (size != sizeof note || !image_read(at, &note, sizeof note) ||
               note.version != MACHINE_NOTE_VERSION))
        image_die("its machine note is of another version; build the image again");
    if (note.memory_mib < 1 || note.memory_mib > MACHINE_MEMORY_MIB_MAX ||
        note.irqchip > MACHINE_IRQCHIP_KERNEL ||
        (note.devices & ~(MACHINE_DEVICE_COM1 | MACHINE_DEVICE_VIRTIO_CONSOLE)) ||
        note.unknown_io > MACHINE_UNKNOWN_IO_IGNORE)
        image_die("its machine note asks for what this VMM does not have");
    return note;
}

static bool segment_overlaps(const struct segment *segment, gpa_t gpa, uint64_t size) {
    return segment->gpa < gpa + size && gpa < segment->gpa + segment->memory_size;
}

static void image_load_segment(struct segment segment) {
    unsigned index = image.segment_count;
    if (segment.memory_size < segment.file_size)
        image_die("segment %u is larger in the file than in memory", index);
    if (!image_has(segment.offset, segment.file_size))
        image_die("segment %u is truncated", index);
    uint8_t *hva = memory_at(segment.gpa, segment.memory_size);
    if (!hva)
        image_die("segment %u (gpa 0x%" PRIx64 ", 0x%" PRIx64 " bytes) lies outside the %" PRIu64
                  " MiB of guest memory",
                  index, segment.gpa, segment.memory_size, memory_size() / MIB);
    if (segment_overlaps(&segment, BOOT_DATA_GPA, BOOT_DATA_SIZE))
        image_die("segment %u overlaps the boot data at gpa 0x%" PRIx64, index, BOOT_DATA_GPA);
    for (unsigned i = 0; i < index; i++)
        if (segment_overlaps(&segment, image.segments[i].gpa, image.segments[i].memory_size))
            image_die("segments %u and %u overlap", i, index);
    memcpy(hva, image.bytes + segment.offset, segment.file_size);
    image.segments[image.segment_count++] = segment;
}

static void image_load_elf(void) {
    for (unsigned i = 0; i < image.elf.e_phnum; i++) {
        Elf64_Phdr header = image_program_header(i);
        if (header.p_type == PT_LOAD && header.p_memsz + header.p_filesz > 0)
            image_load_segment(
                (struct segment){header.p_offset, header.p_filesz, header.p_paddr, header.p_memsz});
    }
    if (image.segment_count == 0)
        image_die("nothing to load: it has no loadable segment");
}

/* Multiboot Specification 0.6.96, "The layout of Multiboot header". */
#define MULTIBOOT_HEADER_MAGIC 0x1badb002u
#define MULTIBOOT_SEARCH 8192
#define MULTIBOOT_VIDEO_MODE (1u << 2)
#define MULTIBOOT_MANDATORY 0xffffu
#define MULTIBOOT_AOUT_KLUDGE (1u << 16)
#define MULTIBOOT_UNDERSTOOD 0x3u /* page-aligned modules, memory information */

struct multiboot_header {
    uint32_t magic, flags, checksum;
    uint32_t header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};

static bool multiboot_find(struct multiboot_header *header, uint64_t *at) {
    for (*at = 0; *at + 12 <= MULTIBOOT_SEARCH; *at += 4) {
        *header = (struct multiboot_header){0};
        if (image_read(*at, header, 12) && header->magic == MULTIBOOT_HEADER_MAGIC &&
            header->magic + header->flags + header->checksum == 0)
            return true;
    }
    return false;
}

/* The a.out kludge: the header itself says which bytes of the file go where. */
static void multiboot_load_kludge(struct multiboot_header *header, uint64_t at) {
    if (!image_read(at, header, sizeof *header))
        image_die("the Multiboot header is truncated");
    uint64_t before = (uint64_t)header->header_addr - header->load_addr;
    if (header->load_addr > header->header_addr || before > at)
        image_die("the Multiboot header puts its load address outside the file");
    uint64_t offset = at - before;
    uint64_t file_size = image.size - offset;
    if (header->load_end_addr)
        file_size = (uint64_t)header->load_end_addr - header->load_addr;
    uint64_t memory_size = file_size;
    if (header->bss_end_addr)
        memory_size = (uint64_t)header->bss_end_addr - header->load_addr;
    image_load_segment((struct segment){offset, file_size, header->load_addr, memory_size});
    image.entry.gpa = header->entry_addr;
}

static void multiboot_load(struct multiboot_header *header, uint64_t at) {
    image.entry.protocol = ENTRY_MULTIBOOT;
    if (header->flags & MULTIBOOT_MANDATORY & ~MULTIBOOT_UNDERSTOOD)
        image_die("its Multiboot header demands %s",
                  header->flags & MULTIBOOT_VIDEO_MODE ? "a video mode, and there is no screen here"
                                                       : "a feature of a later specification");
    if (header->flags & MULTIBOOT_AOUT_KLUDGE) {
        multiboot_load_kludge(header, at);
        return;
    }
    if (!image.is_elf || image.is_64)
        image_die("a Multiboot header without load addresses needs a 32-bit ELF file");
    image_load_elf();
    image.entry.gpa = image.elf.e_entry;
}

struct entry image_load(void) {
    struct multiboot_header multiboot;
    uint64_t multiboot_at;
    uint32_t size;
    uint64_t note = image_note(XEN_ELFNOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY, &size);
    if (note) {
        if ((size != 4 && size != 8) || !image_read(note, &image.entry.gpa, size))
            image_die("its PVH entry note is damaged");
        image_load_elf();
    } else if (multiboot_find(&multiboot, &multiboot_at)) {
        multiboot_load(&multiboot, multiboot_at);
    } else if (image.is_elf) {
        image_die("no entry note: it has neither a PVH entry note nor a Multiboot header");
    } else {
        image_die("not an image: neither ELF nor Multiboot");
    }
    if (image.entry.gpa > UINT32_MAX || !memory_at(image.entry.gpa, 1))
        image_die("its entry point 0x%" PRIx64 " lies outside guest memory", image.entry.gpa);
    return image.entry;
}

/* ---------------------------------------------------------------------------------------------- */
/* Symbols */

static int symbol_order(const void *a, const void *b) {
    uint64_t left = ((const struct symbol *)a)->gva;
    uint64_t right = ((const struct symbol *)b)->gva;
    return left < right ? -1 : left > right;
}

/* Functions, and the labels of assembly code, which have no type. */
static bool symbol_is_code(const Elf64_Sym *symbol) {
    unsigned type = ELF64_ST_TYPE(symbol->st_info);
    Elf64_Shdr section;
    return (type == STT_FUNC || type == STT_NOTYPE) && symbol->st_shndx != SHN_UNDEF &&
           symbol->st_shndx < image.elf.e_shnum &&
           image_read_item(image.elf.e_shoff, symbol->st_shndx, &section, sizeof section) &&
           (section.sh_flags & SHF_EXECINSTR);
}

static void symbols_read(const Elf64_Shdr *table, const Elf64_Shdr *strings) {
    uint64_t count = table->sh_size / sizeof(Elf64_Sym);
    if (count == 0 || !image_has(table->sh_offset, table->sh_size) || strings->sh_size == 0 ||
        !image_has(strings->sh_offset, strings->sh_size) ||
        image.bytes[strings->sh_offset + strings->sh_size - 1] != '\0')
        return;
    image.symbols = calloc(count, sizeof *image.symbols);
    for (uint64_t i = 0; image.symbols && i < count; i++) {
        Elf64_Sym symbol;
        if (!image_read_item(table->sh_offset, i, &symbol, sizeof symbol) ||
            !symbol_is_code(&symbol) || symbol.st_name == 0 || symbol.st_name >= strings->sh_size)
            continue;
        const char *name = (const char *)image.bytes + strings->sh_offset + symbol.st_name;
        image.symbols[image.symbol_count++] = (struct symbol){symbol.st_value, name};
    }
    if (image.symbols)
        qsort(image.symbols, image.symbol_count, sizeof *image.symbols, symbol_order);
}

/* Symbols make messages better and nothing else: a damaged table is as good as none. Most runs without a record
 * need none. */
static void symbols_load(void) {
    image.symbols_are_loaded = true;
    if (!image.is_64)
        return;
    for (unsigned i = 0; i < image.elf.e_shnum; i++) {
        Elf64_Shdr section;
        Elf64_Shdr strings;
        if (!image_read_item(image.elf.e_shoff, i, &section, sizeof section))
            return;
        if (section.sh_type == SHT_SYMTAB &&
            image_read_item(image.elf.e_shoff, section.sh_link, &strings, sizeof strings)) {
            symbols_read(&section, &strings);
            return;
        }
    }
}

struct symbol_text symbol_at(gva_t gva) {
    struct symbol_text result = {""};
    if (!image.symbols_are_loaded)
        symbols_load();
    size_t low = 0;
    size_t high = image.symbol_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (image.symbols[middle].gva <= gva)
            low = middle + 1;
        else
            high = middle;
    }
    /* The last symbol has no successor to end it; code is not further than a page past it. */
    if (low > 0 && (low < image.symbol_count || gva - image.symbols[low - 1].gva < PAGE_SIZE))
        snprintf(result.text, sizeof result.text, "%s+0x%" PRIx64, image.symbols[low - 1].name,
                 gva - image.symbols[low - 1].gva);
    return result;
}

struct symbol_text symbol_or_address(gva_t gva) {
    struct symbol_text symbol = symbol_at(gva);
    struct symbol_text result;
    snprintf(result.text, sizeof result.text,
             symbol.text[0] ? "0x%" PRIx64 " (%.56s)" : "0x%" PRIx64, gva, symbol.text);
    return result;
}
