; From the PVH entry point to C: the only code here that runs in 32-bit mode, the exception stubs,
; and the way into ring 3 and back.
;
; The VMM (or any PVH boot loader) enters pvh_entry in 32-bit protected mode with paging off and
; ebx = gpa of hvm_start_info (include/pvh.h). What long mode needs - page tables, GDT - is static
; data, computed by the assembler, so that entering it takes a dozen instructions.

PTE_PRESENT     equ 1 << 0
PTE_WRITABLE    equ 1 << 1
PTE_LARGE       equ 1 << 7
CR0_WP          equ 1 << 16             ; read-only pages bind ring 0, too
CR0_PG          equ 1 << 31
CR4_PAE         equ 1 << 5
CR4_OSFXSR      equ 1 << 9
MSR_EFER        equ 0xc0000080
EFER_LME        equ 1 << 8
EFER_NXE        equ 1 << 11             ; bit 63 of an entry is no-execute, not reserved

VECTORS_WITH_ERROR_CODE equ 0x60227d00  ; as in include/x86.h

KERNEL_CODE     equ 0x08                ; selectors: the order of the GDT below
KERNEL_DATA     equ 0x10
USER_DATA       equ 0x18 | 3
USER_CODE       equ 0x20 | 3

extern guest_start, trap_dispatch

; The ELF note that makes this image bootable (Xen, "x86/HVM direct boot ABI").
section .note.pvh note alloc noexec nowrite align=4
        dd 4, 4, 18                     ; name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
        db "Xen", 0
        dd pvh_entry

section .text
bits 32
; With its size, so that gdb takes all of it, .long_mode too, for the entry function, where backtraces end.
global pvh_entry:function (pvh_entry.end - pvh_entry)
pvh_entry:
        mov esp, boot_stack.top
        lgdt [gdt_pointer]
        mov eax, cr4
        or eax, CR4_PAE | CR4_OSFXSR    ; OSFXSR: the coverage build links a library that uses SSE
        mov cr4, eax
        mov eax, boot_pml4
        mov cr3, eax
        mov ecx, MSR_EFER
        rdmsr
        or eax, EFER_LME | EFER_NXE
        wrmsr
        mov eax, cr0
        or eax, CR0_PG | CR0_WP
        mov cr0, eax                    ; long mode is active now, in 32-bit compatibility mode
        jmp KERNEL_CODE:.long_mode
bits 64
.long_mode:
        mov eax, KERNEL_DATA
        mov ds, eax
        mov es, eax
        mov ss, eax
        mov edi, ebx                    ; guest_start(start_info_gpa)
        xor ebp, ebp                    ; the VMM's backtraces end here
        call guest_start
        ud2                             ; it does not return
.end:

; One stub for each vector. The CPU pushes an error code for some exceptions; the others get a 0, so
; that every struct trap_frame (include/machine.h) looks alike. Stubs are 16 bytes apart:
; trap_install() computes their addresses.
global trap_stubs
align 16
trap_stubs:
%assign vector 0
%rep 256
        align 16
%if VECTORS_WITH_ERROR_CODE >> vector & 1 && vector < 32
        push vector
%else
        push 0
        push vector
%endif
        jmp trap_entry
%assign vector vector + 1
%endrep

static trap_entry:function (trap_entry.end - trap_entry)
trap_entry:
        push rax
        push rbx
        push rcx
        push rdx
        push rbp
        push rsi
        push rdi
        push r8
        push r9
        push r10
        push r11
        push r12
        push r13
        push r14
        push r15
        cld
        mov rdi, rsp                    ; trap_dispatch(struct trap_frame *)
        mov rbp, rsp
.framed:
        and rsp, -16                    ; what the C ABI expects at a call
        call trap_dispatch
        mov rsp, rbp
.unframed:
        pop r15
        pop r14
        pop r13
        pop r12
        pop r11
        pop r10
        pop r9
        pop r8
        pop rdi
        pop rsi
        pop rbp
        pop rdx
        pop rcx
        pop rbx
        pop rax
        add rsp, 16                     ; vector, error code
        iretq
.end:

; For gdb: where the registers of the code that was interrupted are, while rbp is at a struct trap_frame (DWARF 4,
; "Call Frame Information"; System V ABI, AMD64 Supplement, "DWARF Register Number Mapping"). The C compiler
; writes the same for its functions; nasm has no directives for it.
TRAP_FRAME_WORDS equ 22
DW_CFA_OFFSET   equ 2 << 6              ; register, words below the end of the frame
DW_CFA_OFFSET_EXTENDED equ 0x05
DW_CFA_DEF_CFA  equ 0x0c
DW_RBP          equ 6
DW_RSP          equ 7
DW_RIP          equ 16
DW_RFLAGS       equ 49

section .debug_frame progbits noalloc noexec nowrite align=8
trap_cie:
        dd .end - .id
.id:    dd 0xffffffff
        db 1, "S", 0                    ; version, augmentation: a signal frame, which ends between two instructions
        db 1, -8 & 0x7f, DW_RIP         ; units of code and of data, the return address
        align 8, db 0
.end:
        dd .fde_end - .fde
.fde:   dd trap_cie
        dq trap_entry.framed, trap_entry.unframed - trap_entry.framed
        db DW_CFA_DEF_CFA, DW_RBP, TRAP_FRAME_WORDS * 8 & 0x7f | 0x80, TRAP_FRAME_WORDS * 8 >> 7
%assign word TRAP_FRAME_WORDS
%macro saved 1-*
%rep %0
        db DW_CFA_OFFSET | %1, word
%assign word word - 1
%rotate 1
%endrep
%endmacro
        saved 15, 14, 13, 12, 11, 10, 9, 8, 5, 4, 6, 1, 2, 3, 0         ; r15 to r8, rdi, rsi, rbp, rdx, rcx, rbx, rax
        db DW_CFA_OFFSET | DW_RIP, 5
        db DW_CFA_OFFSET_EXTENDED, DW_RFLAGS, 3
        db DW_CFA_OFFSET | DW_RSP, 2
        align 8, db 0
.fde_end:

section .text
; uint64_t user_call(uint64_t entry_gva, uint64_t stack_gva, uint64_t argument)
; Enter ring 3 as if returning from an interrupt there. RSP0 of the TSS points at the registers
; saved here: a trap out of ring 3 pushes its frame below them, and user_return finds them.
global user_call
extern tss
user_call:
        push rbp
        mov rbp, rsp
        push rbx
        push r12
        push r13
        push r14
        push r15
        pushfq
        mov [tss + 4], rsp              ; RSP0: SDM 3A "64-Bit TSS Format"
        push USER_DATA
        push rsi
        pushfq
        push USER_CODE
        push rdi
        mov rdi, rdx
        iretq

; void user_return(uint64_t result)
; Ring 3 is done: return from the user_call() that entered it, with the flags as they were.
global user_return
user_return:
        mov rax, rdi
        mov rsp, [tss + 4]
        popfq
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbx
        pop rbp
        ret

section .data
align 8
global gdt
gdt:
        dq 0
        dq 0x00af9b000000ffff           ; KERNEL_CODE: 64-bit, ring 0
        dq 0x00cf93000000ffff           ; KERNEL_DATA
        dq 0x00cff3000000ffff           ; USER_DATA, ring 3
        dq 0x00affb000000ffff           ; USER_CODE
global gdt_tss
gdt_tss:
        dq 0, 0                         ; trap_install() fills it in
gdt_pointer:
        dw $ - gdt - 1
        dq gdt

; gva = gpa for the first 4 GiB, in 2 MiB pages, for ring 0 only. Lessons have the rest of the
; address space to themselves.
align 4096
global boot_pml4
boot_pml4:
        dq boot_pdpt + PTE_PRESENT + PTE_WRITABLE
        times 511 dq 0
boot_pdpt:
        dq boot_pd + 0x0000 + PTE_PRESENT + PTE_WRITABLE
        dq boot_pd + 0x1000 + PTE_PRESENT + PTE_WRITABLE
        dq boot_pd + 0x2000 + PTE_PRESENT + PTE_WRITABLE
        dq boot_pd + 0x3000 + PTE_PRESENT + PTE_WRITABLE
        times 508 dq 0
boot_pd:
%assign gpa 0
%rep 4 * 512
        dq gpa + PTE_PRESENT + PTE_WRITABLE + PTE_LARGE
%assign gpa gpa + 0x200000
%endrep

section .bss
align 16
boot_stack:
        resb 32768
.top:
