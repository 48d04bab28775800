; The counter guest: one boot sector for a PC BIOS. It counts timer ticks, prints them on COM1, rewrites
; memory by a rule that can be checked from outside, writes its counters to its disk if it is told to, and
; halts in between.
;
;     nasm -f bin -o counter.bin counter.asm
;
; counter.py carries the assembled bytes, writes the parameter block into them, and checks memory by the
; same rule.
;
; Where things are, as physical addresses (the code runs in flat 32-bit protected mode without paging, so
; linear is physical):
;
;     0x5000  interrupt descriptor table, 33 gates, of which only the last (vector 0x20, IRQ 0) is present
;     0x6000  tick   u32, incremented on every timer interrupt, before it is printed
;     0x6004  step   u32, incremented after every page that was filled
;     0x7c00  this sector; the stack grows down from here
;     0x7da0  parameter block (offset 0x1a0 in the sector), see the end of this file
;
; The rule of memory. Step s fills page (base + (s mod page_count) * 4096) with the little-endian u32 s,
; from its first byte to its last, and only then increments the step counter. So while the counter says s,
; page i holds wholly the largest k < s with k = i (mod page_count), or zeros if there is none, except page
; (s mod page_count), which is s up to some place and its older content from there on.
;
; The rule holds for 2^32 steps (16 TiB of writing); then the step counter wraps and the order of the pages
; with it, unless page_count is a power of two.
;
; Interrupts are enabled only at hlt. A tick that comes while pages are being filled waits in the interrupt
; controller; further ones merge with it, so an overloaded guest ticks late, and never skips a number.

TICK            equ 0x6000
STEP            equ 0x6004
IDT             equ 0x5000
IRQ0_VECTOR     equ 0x20
IDT_BYTES       equ (IRQ0_VECTOR + 1) * 8
CODE            equ 0x08
DATA            equ 0x10
COM1            equ 0x3f8
IDE             equ 0x1f0

        org 0x7c00
        bits 16

start:
        cli
        cld
        xor ax, ax
        mov ds, ax
        in al, 0x92                     ; A20 by the system control port; bit 0 would reset the machine
        or al, 0x02
        and al, 0xfe
        out 0x92, al
        lgdt [gdt_pointer]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        jmp dword CODE:protected

        bits 32

protected:
        mov ax, DATA
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov esp, start

        mov edi, IDT
        mov ecx, IDT_BYTES / 4
        xor eax, eax
        rep stosd
        mov dword [IDT + IRQ0_VECTOR * 8], (CODE << 16) | on_tick_low
        mov dword [IDT + IRQ0_VECTOR * 8 + 4], 0x8e00           ; present, ring 0, 32-bit interrupt gate
        lidt [idt_pointer]
        mov [TICK], eax
        mov [STEP], eax

        mov esi, port_writes            ; interrupt controllers and COM1, as pairs of (port, value)
.next_write:
        movzx edx, word [esi]
        mov al, [esi + 2]
        add esi, 3
        out dx, al
        cmp esi, port_writes.end
        jb .next_write

        cmp byte [prefill], 0
        je .filled
        mov ebx, [page_count]
        call fill_pages
.filled:
        mov al, 0x34                    ; channel 0, low then high byte, mode 2: one edge a period
        out 0x43, al
        mov al, [divisor]
        out 0x40, al
        mov al, [divisor + 1]
        out 0x40, al

wait_for_tick:
        sti                             ; takes effect after hlt began, so no interrupt falls in between
        hlt
        cli
        inc dword [TICK]
        mov ebx, [TICK]
        mov ecx, 8
.next_digit:
        rol ebx, 4
        mov al, bl
        and al, 0x0f
        cmp al, 10                      ; carry for 0..9; then 0..9 -> 0x30.., 10..15 -> 0x41.. without a branch
        sbb al, 0x69
        das
        call put_byte
        loop .next_digit
        mov al, 10
        call put_byte
        mov ebx, [pages_per_tick]
        call fill_pages
        mov al, [disk_mask]
        test al, al
        jz wait_for_tick
        test [TICK], al
        jnz wait_for_tick
        call write_disk
        jmp wait_for_tick

; Write AL to COM1 once its transmitter takes a byte. Changes EDX, AH.
put_byte:
        mov ah, al
        mov edx, COM1 + 5
.busy:
        in al, dx
        test al, 0x20                   ; transmit holding register empty
        jz .busy
        mov al, ah
        mov edx, COM1
        out dx, al
        ret

; Do EBX steps. Changes EAX, EBX, ECX, EDX, EDI.
fill_pages:
        test ebx, ebx
        jz .done
        mov eax, [STEP]
        xor edx, edx
        div dword [page_count]
        shl edx, 12
        add edx, [base]
        mov edi, edx
        mov eax, [STEP]
        mov ecx, 1024
        rep stosd
        inc dword [STEP]
        dec ebx
        jmp fill_pages
.done:
        ret

on_tick:
        push eax
        mov al, 0x20
        out 0x20, al                    ; end of interrupt
        pop eax
        iretd

on_tick_low     equ 0x7c00 + (on_tick - start)                  ; below 64 KiB, so the gate's upper half is 0

port_writes:
        %macro port_write 2
        dw %1
        db %2
        %endmacro
        port_write 0x20, 0x11           ; first controller: initialise, edge triggered, cascaded, with ICW4
        port_write 0x21, IRQ0_VECTOR
        port_write 0x21, 0x04           ; the second one hangs on line 2
        port_write 0x21, 0x01
        port_write 0x21, 0xfe           ; only IRQ 0
        port_write 0xa1, 0xff
        port_write COM1 + 1, 0x00       ; no interrupts
        port_write COM1 + 3, 0x80       ; divisor latch: 115200 baud
        port_write COM1 + 0, 0x01
        port_write COM1 + 1, 0x00
        port_write COM1 + 3, 0x03       ; 8 data bits, no parity, 1 stop bit
        port_write COM1 + 2, 0x00       ; no FIFO
.end:

        align 4, db 0
gdt:                                    ; "accessed" is set already, so that the processor does not change the sector
        dq 0
        dq 0x00cf9b000000ffff           ; code: base 0, limit 4 GiB, 32 bit
        dq 0x00cf93000000ffff           ; data: the same
gdt_pointer:
        dw gdt_pointer - gdt - 1
        dd gdt
idt_pointer:
        dw IDT_BYTES - 1
        dd IDT

; The parameter block. counter.py overwrites these values in every image it writes.
        times 0x1a0 - ($ - start) db 0
base:           dd 0x200000             ; physical address of the first page, a multiple of 4096
page_count:     dd 256                  ; at least 1
pages_per_tick: dd 0
divisor:        dw 11932                ; of 1193182 Hz: 100 ticks a second
prefill:        db 0                    ; 1: fill every page once before the first tick (steps 0..page_count-1)
disk_mask:      db 0                    ; write the disk on ticks that have none of these bits; 0: never

; Write the counters to sector 1 of the first IDE disk, by programmed I/O. Changes EAX, ECX, EDX, ESI.
write_disk:
        mov edx, IDE + 0x206
        mov al, 2                       ; no interrupts
        out dx, al
        mov esi, ide_writes
        mov edx, IDE + 1
.next:
        inc edx
        lodsb
        out dx, al
        cmp esi, ide_writes.end
        jb .next
.busy:
        in al, dx
        and al, 0x88
        cmp al, 0x08                    ; not busy, and it wants the data
        jne .busy
        mov edx, IDE
        mov esi, TICK
        mov ecx, 256
        rep outsw
        mov edx, IDE + 7
.writing:
        in al, dx
        test al, 0x80
        jnz .writing
        ret

ide_writes:                             ; ports IDE + 2 to IDE + 7
        db 1                            ; one sector
        db 1, 0, 0                      ; number 1
        db 0xe0                         ; first disk, by number
        db 0x30                         ; write sectors
.end:

        times 510 - ($ - start) db 0
        dw 0xaa55
