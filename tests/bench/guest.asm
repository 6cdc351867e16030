; The guests of the benchmark: as many OUTs to a port as are asked for, and the end of the run. The VMM enters a PVH
; image in 32-bit protected mode, with segments that will do, so that nothing need be set up first.
;
;   nasm -DPORT=0x3f8 -DEXITS=1000 guest.asm

        section .note.pvh note alloc noexec nowrite align=4
        dd 4, 4, 18                     ; as in guest/boot.asm
        db "Xen", 0
        dd pvh_entry

        section .note.kvmlab note alloc noexec nowrite align=4
        dd 7, 20, 1                     ; include/machine.h, struct machine_note
        db "kvmlab", 0, 0
        dd 1, 64, 1, 1, 1               ; version; MiB; split irqchip; COM1; unknown accesses are ignored

        section .text
        bits 32
global pvh_entry
pvh_entry:
        mov esi, line
        mov edi, line.size
        mov edx, 0x3f8
.next:  mov al, [esi]
        out dx, al
        inc esi
        dec edi
        jnz .next
%if EXITS
        mov edx, PORT
        mov ecx, EXITS
        mov al, '.'
.again: out dx, al
        dec ecx
        jnz .again
%endif
        mov edx, 0xf4
        xor eax, eax
        out dx, eax

        section .rodata
line:   db "hi", 10
.size   equ $ - line
